"""Checkpoints of experts and of virtual pipeline stages: bit-exact resume, and other layouts.

Not proved: everything about files and failures, which `test_checkpoint_ranks.py` shows for one
chunk of a dense model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_matpo.config.train import ParallelConfig
from tests.helpers.checkpoint_ranks import train_and_save
from tests.helpers.dist import RankPool
from tests.helpers.hf_models import random_config, write_model
from tests.helpers.tiny import make_batch, tiny_config

pytestmark = pytest.mark.dist

BATCHES = [make_batch((3, 12), 0), make_batch((2, 8), 1)]
MOVES = {
    "qwen2": (
        ParallelConfig(pipeline=2, virtual=2),
        [ParallelConfig(), ParallelConfig(tensor=2, sequence=True)],
    ),
    "qwen3_moe": (
        ParallelConfig(data=2, expert=2),
        [ParallelConfig(), ParallelConfig(tensor=2, pipeline=2, virtual=2, sequence=True)],
    ),
}


def run(
    ranks: RankPool, model: Path, layout: ParallelConfig, folder: Path, until: int
) -> list[dict[str, Any]]:
    config = replace(tiny_config(model, timeout_s=200.0), parallel=layout)
    return ranks.run(
        train_and_save, layout.world_size, config, BATCHES, folder, until, timeout_s=300.0
    )


@pytest.mark.parametrize("family", MOVES)
def test_resume_is_bit_exact_and_other_layouts_take_over(ranks, tmp_path, family):
    model = write_model(random_config(family, 0), tmp_path / "model")
    first, others = MOVES[family]
    straight = run(ranks, model, first, tmp_path / "straight", 3)
    run(ranks, model, first, tmp_path / "broken", 2)
    for i, layout in enumerate(others):
        folder = tmp_path / f"moved{i}"
        (folder / "step_2").mkdir(parents=True)
        for file in (tmp_path / "broken").rglob("*"):
            if file.is_file() and file.parent.name in ("broken", "step_2"):
                (folder / file.relative_to(tmp_path / "broken")).write_bytes(file.read_bytes())
        moved = run(ranks, model, layout, folder, 3)
        assert moved[0]["extra"] == {"updates": 2}
        (result,) = moved[0]["results"]
        assert result.loss == pytest.approx(straight[0]["results"][2].loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(straight[0]["results"][2].grad_norm, rel=1e-5)
        for name, value in straight[0]["weights"].items():
            torch.testing.assert_close(
                moved[0]["weights"][name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max())
            )
    resumed = run(ranks, model, first, tmp_path / "broken", 3)
    for before, after in zip(straight, resumed, strict=True):
        assert after["results"] == before["results"][2:]
        for name, value in before["weights"].items():
            assert torch.equal(after["weights"][name], value), name
