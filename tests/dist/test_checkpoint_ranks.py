"""Checkpoints on several ranks: bit-exact resume in any layout, and damage that is named.

Saves that are killed are in test_checkpoint_kills.py. Not proved: shared file systems other than
the local one, and what a power cut leaves on disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_matpo.checkpoint_files import MANIFEST
from megatron_matpo.config import load_resolved
from megatron_matpo.megatron.checkpoint_reader import CheckpointReader
from tests.helpers.checkpoint_ranks import (
    change_while_writing,
    failing_save,
    late_writer,
    restore_and_save,
    restore_error,
    restored_extra,
    train_and_save,
    with_checkpoint,
)
from tests.helpers.dist import RankPool, run_ranks
from tests.helpers.tiny import VOCAB_SIZE, make_batch, make_tiny_model, tiny_config

pytestmark = pytest.mark.dist

BATCHES = [make_batch((3, 11), 0), make_batch((2, 7), 1)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("checkpoint") / "model", tied=True)


@pytest.fixture(scope="module")
def divisible_by_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with as many key/value heads as TP4 needs."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    folder = tmp_path_factory.mktemp("checkpoint") / "wide"
    return make_tiny_model(folder, tied=False, seed=3, **heads)


def run(
    ranks: RankPool, config: Any, folder: Path, until: int, world_size: int = 2
) -> list[dict[str, Any]]:
    story = (train_and_save, world_size, config, BATCHES, folder, until)
    return ranks.run(*story, timeout_s=300.0)


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


def test_other_layouts_take_over_bit_for_bit(ranks, divisible_by_4, tmp_path):
    """TP2 x PP2 -> TP1, TP4, DP2: same weights and optimizer state, and the same next update."""
    config = tiny_config(divisible_by_4, tp=2, pp=2, timeout_s=240.0)
    saved = tmp_path / "saved"
    straight = run(ranks, config, saved, 3, world_size=4)
    original = CheckpointReader(saved / "step_2")
    shapes = {key: s for key, s in original.shapes().items() if "word_embeddings" not in key}
    shapes = {key: s for key, s in shapes.items() if "output_layer" not in key}
    assert len([key for key in shapes if key.startswith("optimizer.exp_avg_sq.")]) == 9
    for layout in ({"tp": 1}, {"tp": 4}, {"dp": 2}):
        config = with_checkpoint(tiny_config(divisible_by_4, **layout), load="step_2")
        to = tmp_path / str(layout)
        world_size = next(iter(layout.values()))
        stories = ranks.run(restore_and_save, world_size, config, BATCHES, saved, to)
        again = CheckpointReader(to / "step_2")
        for key in shapes:
            assert torch.equal(again.read(key), original.read(key)), (layout, key)
        # The vocabulary is padded to a multiple of TP; its real rows are the same.
        for key in set(original.shapes()) - set(shapes):
            ours, theirs = again.read(key)[:VOCAB_SIZE], original.read(key)[:VOCAB_SIZE]
            assert torch.equal(ours, theirs), (layout, key)
        want = straight[0]["results"][2]
        for story in stories:
            assert story["result"].loss == pytest.approx(want.loss, rel=1e-6)
            assert story["result"].grad_norm == pytest.approx(want.grad_norm, rel=1e-5)


def test_keep_last_and_keep_every(ranks, model_folder, tmp_path):
    config = tiny_config(model_folder, timeout_s=300.0)
    config = with_checkpoint(config, keep_last=2, keep_every=3)
    run(ranks, config, tmp_path, 7, world_size=1)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["latest", "step_3", "step_5", "step_6", "step_7"]
    assert (tmp_path / "latest").read_text() == "step_7\n"
    assert load_resolved(str(tmp_path / "step_7" / "config.yaml")) == config


def test_updates_during_the_write_change_nothing(ranks, model_folder, tmp_path):
    config = tiny_config(model_folder, tp=2)
    stories = ranks.run(change_while_writing, 2, config, BATCHES, tmp_path)
    assert [story["is_early"] for story in stories] == [False, False]
    at_once, meanwhile = (
        json.loads((tmp_path / name / "step_1" / MANIFEST).read_text())["files"]
        for name in ("at_once", "meanwhile")
    )
    for rank in range(2):
        file = f"__{rank}_0.distcp"
        assert at_once[file]["num_bytes"] > 10_000
        assert meanwhile[file] == at_once[file]
    assert (tmp_path / "meanwhile" / "latest").read_text() == "step_1\n"
    further = tmp_path / "meanwhile" / "step_1" / "in_flight.rollout"
    assert further.read_text() == "groups of rank 0"
    assert meanwhile[further.name]["num_bytes"] == 16, "it is checked before it is loaded"


@pytest.mark.parametrize("on_failure", ["stop", "warn"])
def test_a_full_disk_on_one_rank_is_reported_on_all(ranks, model_folder, tmp_path, on_failure):
    config = with_checkpoint(tiny_config(model_folder, tp=2), on_failure=on_failure)
    stories = ranks.run(failing_save, 2, config, BATCHES, tmp_path)
    for story in stories:
        assert story["left"] == ["latest", "step_1"]
        if on_failure == "stop":
            assert "rank 1: OSError: [Errno 28] No space left on device" in story["error"]
            assert f"checkpoint {tmp_path / 'step_2'} was not written" in story["error"]
        else:
            assert story["error"] == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_1", "step_3"]


def test_a_write_that_hangs_is_a_deadline_that_names_its_setting(model_folder, tmp_path):
    config = with_checkpoint(tiny_config(model_folder, tp=2), timeout_s=1.0)
    errors = run_ranks(late_writer, 2, config, tmp_path)
    expected = f"checkpoint {tmp_path / 'step_1'}: trainer ranks [1] have not written their files"
    assert errors == [f"{expected} within checkpoint.timeout_s=1"] * 2


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_damage_is_named_with_the_way_out(ranks, model_folder, tmp_path):
    config = tiny_config(model_folder, tp=2)
    run(ranks, config, tmp_path, 2)
    data = tmp_path / "step_2" / "__1_0.distcp"
    whole = data.read_bytes()
    way_out = "the newest whole checkpoint before it is step_1: resume there with checkpoint.load="

    flip(data)
    first, second = ranks.run(restore_error, 2, config, tmp_path)
    assert first == second
    assert first.startswith(f"{data}: damaged, checksum ") and way_out + "step_1" in first
    # Only sizes: the flipped byte is not noticed before it is loaded.
    by_size = with_checkpoint(config, verify="sizes")
    assert ranks.run(restore_error, 2, by_size, tmp_path) == ["", ""]

    data.write_bytes(whole[:-1])
    found = f"{data}: expected {len(whole)} bytes, found {len(whole) - 1} bytes; {way_out}step_1"
    errors = ranks.run(restore_error, 2, by_size, tmp_path)
    assert all(error.startswith(found) for error in errors)
    (tmp_path / "step_2" / MANIFEST).unlink()
    (error, _) = ranks.run(restore_error, 2, config, tmp_path)
    assert f"step_2 has no {MANIFEST}" in error and way_out in error

    for load in ("whole", "step_1"):
        config_1 = with_checkpoint(config, load=load)
        assert ranks.run(restored_extra, 2, config_1, tmp_path) == [{"updates": 1}] * 2
    flip(tmp_path / "step_1" / "config.yaml")
    (error, _) = ranks.run(restore_error, 2, config, tmp_path)
    assert "step_2" in error and error.endswith("there is no older checkpoint that is whole")
    (error, _) = ranks.run(restore_error, 2, with_checkpoint(config, load="step_9"), tmp_path)
    assert "checkpoint.load=step_9: not in" in error and "there are step_1" in error


def test_a_checkpoint_of_another_model_is_refused(ranks, model_folder, tmp_path):
    run(ranks, tiny_config(model_folder), tmp_path / "ck", 1, world_size=1)
    other = make_tiny_model(tmp_path / "other", tied=False)
    (error,) = ranks.run(restore_error, 1, tiny_config(other), tmp_path / "ck")
    assert "is of another model" in error and "'tied_embeddings': 0" in error
