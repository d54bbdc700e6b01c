"""Gradients and optimizer state that go to the host and come back change nothing but the memory.

Proved on gloo in float32 for the layouts below, with the distributed optimizer: scores, exports,
updates and checkpoints are bit for bit those of a run that never moved anything; what was moved is
gone meanwhile. And: the export that every rank gets is the one of rank 0. Not proved here: pinned
memory, and that a GPU's memory is free (tests/gpu).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_matpo.config.lora import LoraConfig
from megatron_matpo.config.train import ParallelConfig
from tests.helpers.checkpoint_ranks import restore_and_save
from tests.helpers.hf_models import random_config, write_model
from tests.helpers.parking_ranks import both_exports, resumed_while_parked, train
from tests.helpers.tiny import make_batch, make_tiny_model, tiny_config

pytestmark = pytest.mark.dist

BATCHES = [make_batch((3, 17), 0), make_batch((2, 9), 1), make_batch((4, 12), 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("parking") / "model", tied=True)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(random_config("qwen3_moe", 0), tmp_path_factory.mktemp("experts") / "model")


@pytest.mark.parametrize(
    ("size", "layout"), [(1, {}), (2, {"dp": 2}), (4, {"pp": 2, "dp": 2})], ids=str
)
def test_a_run_that_parks_is_the_same_run(ranks, model, tmp_path, size, layout):
    config = tiny_config(model, **layout)
    stayed = ranks.run(train, size, config, BATCHES, tmp_path / "stayed", False)
    parked = ranks.run(train, size, config, BATCHES, tmp_path / "parked", True)
    for one, other in zip(stayed, parked, strict=True):
        torch.testing.assert_close(other["results"], one["results"], rtol=0, atol=0)
        torch.testing.assert_close(other["weights"], one["weights"], rtol=0, atol=0)
        # All of it is gone while parked, and there again for the updates.
        assert other["held"] == [0] * 4
        assert other["state_bytes"] == one["state_bytes"] > 0
        assert other["moved"][0] >= one["state_bytes"], "torch counts steps in tensors of its own"
    # Bit for bit the same checkpoint: the next update from either gives the same.
    next_ones = [
        ranks.run(restore_and_save, size, config, BATCHES, tmp_path / name, tmp_path / f"{name}_2")
        for name in ("stayed", "parked")
    ]
    for one, other in zip(*next_ones, strict=True):
        assert other["result"] == one["result"]
        torch.testing.assert_close(other["weights"], one["weights"], rtol=0, atol=0)
    into_parked = ranks.run(resumed_while_parked, size, config, BATCHES, tmp_path / "parked")
    assert into_parked == [story["result"] for story in next_ones[0]]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        ParallelConfig(),
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=2, data=2),
        ParallelConfig(tensor=2, pipeline=2, virtual=2),
    ],
    ids=str,
)
def test_every_rank_gets_what_the_first_one_gets(ranks, model, layout, dtype):
    config = replace(tiny_config(model), parallel=layout)
    assert_everywhere(ranks.run(both_exports, layout.world_size, config, dtype))


@pytest.mark.parametrize(
    "layout",
    [
        ParallelConfig(data=2, expert=2),
        ParallelConfig(pipeline=2, data=2, expert=2),
        ParallelConfig(tensor=4, expert=2, sequence=True),
    ],
    ids=str,
)
def test_experts_come_from_whoever_holds_them(ranks, experts, layout):
    config = replace(tiny_config(experts), parallel=layout)
    assert_everywhere(ranks.run(both_exports, layout.world_size, config, None))


def test_adapters_are_merged_on_every_rank(ranks, model):
    config = replace(tiny_config(model, tp=2), lora=LoraConfig(rank=2))
    assert_everywhere(ranks.run(both_exports, 2, config, None))


def assert_everywhere(stories):
    expected = stories[0][0]
    assert expected
    for _, everywhere in stories:
        assert list(everywhere) == list(expected), "in the same order"
        torch.testing.assert_close(everywhere, expected, rtol=0, atol=0)
