"""Whenever ranks are killed, or the disk is full, a whole checkpoint stays and is loaded next.

`make test` kills a few times, `pytest -m sweep tests/dist/test_checkpoint_kills.py` 20 times.
Processes are killed, not the machine: what the disk's own cache loses in a power cut is not shown.
"""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_matpo import checkpoint_files as files
from tests.helpers.checkpoint_ranks import (
    restored_extra,
    save_then_die,
    save_to_small_disk,
    with_checkpoint,
)
from tests.helpers.dist import run_ranks
from tests.helpers.killed_saves import WORLD_SIZE, kill, nursery, wait_for
from tests.helpers.tiny import make_batch, make_tiny_model, tiny_config

pytestmark = pytest.mark.dist

# Some dozens of saves of the tiny model fit into it.
LONGEST_S = 0.6


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("checkpoint") / "model", tied=True)


def latest_whole(folder: Path) -> int:
    """The step that would be resumed, after a look at every byte of it."""
    path = files.candidates(folder, files.LATEST)[0]
    assert list(files.problems(path, files.read_manifest(path), full=True)) == []
    return int(re.findall(r"\d+", path.name)[0])


def wait_for_newer(folder: Path, step: int) -> None:
    """Return when a checkpoint after `step` is the latest."""
    end = time.monotonic() + 60
    while not (folder / "latest").exists() or (folder / "latest").read_text() == f"step_{step}\n":
        assert time.monotonic() < end, "no newer checkpoint within 60 s"
        time.sleep(0.002)


def was_interrupted(folder: Path) -> bool:
    """The kill left a save half done."""
    latest = (folder / "latest").read_text().strip()
    names = [path.name for path in folder.iterdir()]
    newer = [n for n in names if re.fullmatch(r"step_\d+", n) and int(n[5:]) > int(latest[5:])]
    return bool(newer) or any(not re.fullmatch(r"step_\d+|latest", name) for name in names)


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.sweep)])
def test_kills_lose_nothing(model_folder, tmp_path, kills):
    draw = random.Random(kills)
    folder, before, interrupted, steps = tmp_path / "checkpoints", 0, 0, []
    with nursery() as ranks:
        for attempt in range(kills + 1):
            config = with_checkpoint(
                tiny_config(model_folder, tp=2), asynchronous=attempt % 2 == 0, timeout_s=20.0
            )
            reports = [tmp_path / f"report_{attempt}_{rank}" for rank in range(WORLD_SIZE)]
            pids = ranks.start(config, folder, reports)
            found = wait_for(reports)
            assert found == [{"step": before, "wrong": 0}] * WORLD_SIZE, attempt
            if attempt == kills:
                kill(pids)
                break
            if attempt % 2 == 0:
                # However slow the machine is: some kills come when newer saves have been made.
                wait_for_newer(folder, before)
            time.sleep(draw.uniform(0, LONGEST_S))
            kill(draw.choice([pids, pids[:1], pids[1:]]))
            time.sleep(draw.uniform(0, 0.02))
            kill(pids)
            interrupted += was_interrupted(folder)
            before = latest_whole(folder)
            steps.append(before)
    assert steps == sorted(steps) and steps[-1] > steps[0], steps
    assert interrupted >= kills // 4, "the kills missed the saves"


@pytest.mark.parametrize("when", ["writing", "renamed"])
def test_killed_at_the_two_ends_of_the_rename(ranks, model_folder, tmp_path, when):
    config = tiny_config(model_folder, tp=2)
    with pytest.raises(AssertionError, match="died with exit code -9"):
        run_ranks(save_then_die, 2, config, [make_batch((2, 7), 1)], tmp_path, when)
    assert (tmp_path / "latest").read_text() == "step_1\n"
    left_behind = "step_2.tmp" if when == "writing" else "step_2"
    assert (tmp_path / left_behind).is_dir()
    assert ranks.run(restored_extra, 2, config, tmp_path) == [{"updates": 1}] * 2


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of its own, of as many bytes as the test's parameter says."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("small_disk", "checks_space"),
    [(18 << 20, True), (3 << 20, False)],
    ids=["noticed before", "noticed while writing"],
    indirect=["small_disk"],
)
def test_a_full_disk_leaves_the_previous_checkpoint(ranks, model_folder, small_disk, checks_space):
    config = with_checkpoint(tiny_config(model_folder), keep_last=100)
    folder = small_disk / "checkpoints"
    (story,) = ranks.run(save_to_small_disk, 1, config, folder, checks_space)
    assert "No space left on device" in story["error"]
    assert f"step_{story['step']}" in story["error"]
    assert ("the checkpoint needs 0.0" in story["error"]) is checks_space
    last = story["step"] - 1
    assert last >= 1 and latest_whole(folder) == last
    expected = ["latest", *(f"step_{step}" for step in range(1, last + 1))]
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
    assert ranks.run(restored_extra, 1, config, folder) == [{"updates": last}]
