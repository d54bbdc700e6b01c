"""Checkpoints on several ranks: bit-exact resume, and nothing lost when ranks die while saving.

Not proved: shared file systems other than the local one, and what a power cut leaves on disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.dist import RankPool, run_ranks
from tests.helpers.megatron_ranks import (
    failing_save,
    restore_error,
    save_then_die,
    train_and_save,
)
from tests.helpers.tiny import make_batch, make_tiny_model, tiny_config

pytestmark = pytest.mark.dist

BATCHES = [make_batch((3, 11), 0), make_batch((2, 7), 1)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("checkpoint") / "model", tied=True)


def run(
    ranks: RankPool, config: Any, folder: Path, until: int, world_size: int = 2
) -> list[dict[str, Any]]:
    return ranks.run(train_and_save, world_size, config, BATCHES, folder, until)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"cp": 2}, {"dp": 2}], ids=str)
def test_resume_is_bit_exact(ranks, model_folder, tmp_path, layout):
    config = tiny_config(model_folder, **layout)
    straight = run(ranks, config, tmp_path / "straight", 4)
    run(ranks, config, tmp_path / "broken", 2)
    resumed = run(ranks, config, tmp_path / "broken", 4)
    for before, after in zip(straight, resumed, strict=True):
        assert before["extra"] is None
        assert after["extra"] == {"updates": 2}
        assert after["results"] == before["results"][2:]
        # The random state was saved after the second draw; the third is the first after resuming.
        assert after["draws"] == before["draws"][2:]
        assert before["weights"].keys() == after["weights"].keys()
        for name, value in before["weights"].items():
            assert torch.equal(after["weights"][name], value), name


def test_another_layout_takes_over(ranks, model_folder, tmp_path):
    straight = run(ranks, tiny_config(model_folder, tp=2), tmp_path / "straight", 4)
    run(ranks, tiny_config(model_folder, tp=2), tmp_path / "moved", 2)
    moved = run(ranks, tiny_config(model_folder), tmp_path / "moved", 4, world_size=1)
    assert moved[0]["extra"] == {"updates": 2}
    for actual, want in zip(moved[0]["results"], straight[0]["results"][2:], strict=True):
        assert actual.loss == pytest.approx(want.loss, rel=1e-5)
        assert actual.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)


def test_only_keep_last_checkpoints_stay(ranks, model_folder, tmp_path):
    run(ranks, tiny_config(model_folder), tmp_path, 4, world_size=1)
    # checkpoint.keep_last is 2.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_3", "step_4"]
    assert (tmp_path / "latest").read_text() == "step_4\n"


@pytest.mark.parametrize("when", ["writing", "renamed"])
def test_killed_while_saving_keeps_the_previous(ranks, model_folder, tmp_path, when):
    config = tiny_config(model_folder, tp=2)
    with pytest.raises(AssertionError, match="died with exit code -9"):
        run_ranks(save_then_die, 2, config, BATCHES, tmp_path, when)
    assert (tmp_path / "latest").read_text() == "step_1\n"
    left_behind = "step_2.tmp" if when == "writing" else "step_2"
    assert (tmp_path / left_behind).is_dir()
    resumed = run(ranks, config, tmp_path, 2)
    assert [story["extra"] for story in resumed] == [{"updates": 1}] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_1", "step_2"]
    assert (tmp_path / "latest").read_text() == "step_2\n"


def test_a_full_disk_on_one_rank_is_an_error_on_all(model_folder, tmp_path):
    config = tiny_config(model_folder, tp=2)
    errors = run_ranks(failing_save, 2, config, BATCHES, tmp_path)
    assert all("No space left on device" in error and "step_2" in error for error in errors)
    assert (tmp_path / "latest").read_text() == "step_1\n"


def test_damage_is_noticed_and_named(ranks, model_folder, tmp_path):
    config = tiny_config(model_folder, tp=2)
    run(ranks, config, tmp_path, 1)
    data = tmp_path / "step_1" / "__1_0.distcp"
    whole = data.read_bytes()

    data.write_bytes(whole[:-1])
    errors = ranks.run(restore_error, 2, config, tmp_path)
    found = f"expected {len(whole)} bytes, found {len(whole) - 1} bytes"
    assert errors == [f"cannot read {tmp_path}: {data}: {found}"] * 2

    data.unlink()
    errors = ranks.run(restore_error, 2, config, tmp_path)
    found = f"expected {len(whole)} bytes, found missing"
    assert all(error.endswith(f"{data}: {found}") for error in errors)


def test_a_checkpoint_of_another_model_is_refused(ranks, model_folder, tmp_path):
    run(ranks, tiny_config(model_folder), tmp_path / "ck", 1, world_size=1)
    other = make_tiny_model(tmp_path / "other", tied=False)
    (error,) = ranks.run(restore_error, 1, tiny_config(other), tmp_path / "ck")
    assert "is of another model" in error and "'tied_embeddings': 0" in error
