"""The plan's weights, gradients and optimizer are what the ranks of a layout allocate, to the byte.

On gloo, for tied and untied embeddings, in fp32 and bf16. The optimizer is split by whole buffers,
padding included: the plan's share of a rank is the largest, and the ranks' sum is exact without the
padding. Not compared here: activations (`tests/unit/megatron/test_activation_bytes.py`), and what
only a GPU has (`tests/gpu/test_memory_gpu.py`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.lora import LoraConfig
from megatron_matpo.config.train import ParallelConfig
from megatron_matpo.planning.parameters import (
    gradient_bytes,
    num_parameters,
    optimizer_bytes,
    weight_bytes,
)
from megatron_matpo.planning.shape import job_of
from tests.helpers.dist import RankPool
from tests.helpers.hf_models import random_config, write_model
from tests.helpers.ledger_ranks import allocated
from tests.helpers.tiny import make_tiny_model, tiny_config

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("tp", "pp", "dp", "precision"),
    [(2, 2, 1, "fp32"), (1, 2, 2, "bf16"), (1, 1, 3, "fp32"), (2, 1, 2, "bf16")],
)
def test_every_rank(
    ranks: RankPool, tmp_path: Path, tied: bool, tp: int, pp: int, dp: int, precision: str
) -> None:
    folder = make_tiny_model(tmp_path / "model", tied=tied)
    config = replace(tiny_config(folder, tp=tp, pp=pp, dp=dp), precision=precision)
    job = job_of(config, HfModelConfig.from_folder(folder))
    measured = ranks.run(allocated, tp * pp * dp, config)
    per_parameter = 8 if precision == "fp32" else 12
    for rank in measured:
        stage = rank["stage"]
        assert rank["parameters_elsewhere"] == 0
        assert rank["numel"] == num_parameters(job, stage)
        assert rank["weights"] == weight_bytes(job, stage)
        assert rank["gradients"] == gradient_bytes(job, stage)
        assert rank["optimizer"] <= optimizer_bytes(job, stage)
    for stage in range(pp):
        of_stage = [rank["optimizer"] for rank in measured if rank["stage"] == stage]
        assert sum(of_stage) == tp * num_parameters(job, stage) * per_parameter
        assert max(of_stage) >= 0.95 * optimizer_bytes(job, stage)


@pytest.mark.parametrize(
    "layout",
    [
        ParallelConfig(data=2, expert=2),
        ParallelConfig(tensor=2, pipeline=2, expert=2, virtual=2, sequence=True),
        ParallelConfig(data=4, expert=2),
    ],
    ids=["ep2", "tp2-pp2-ep2-chunks", "dp4-ep2"],
)
def test_every_rank_with_experts(ranks: RankPool, tmp_path: Path, layout: ParallelConfig) -> None:
    """Experts have buffers of their own, shared by other ranks; some layers have none."""
    folder = write_model(random_config("qwen3_moe", 1), tmp_path / "model")
    hf = HfModelConfig.from_folder(folder)
    assert hf.moe is not None
    config = replace(tiny_config(folder, timeout_s=200.0), parallel=layout)
    job = job_of(config, hf)
    measured = ranks.run(allocated, layout.world_size, config)
    for rank in measured:
        stage = rank["stage"]
        assert rank["numel"] == num_parameters(job, stage)
        assert rank["weights"] == weight_bytes(job, stage)
        assert rank["gradients"] == gradient_bytes(job, stage)
        assert rank["optimizer"] <= optimizer_bytes(job, stage)
        assert rank["optimizer"] >= 0.9 * optimizer_bytes(job, stage)


@pytest.mark.parametrize("targets", [["all"], ["q_proj", "down_proj"]], ids=["all", "two"])
@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 2), (2, 2, 1)])
def test_every_rank_with_adapters(
    ranks: RankPool, tmp_path: Path, targets: list[str], tp: int, pp: int, dp: int
) -> None:
    """Frozen weights lie outside the buffers, without gradients and optimizer."""
    folder = make_tiny_model(tmp_path / "model", tied=False)
    config = replace(
        tiny_config(folder, tp=tp, pp=pp, dp=dp),
        precision="bf16",
        lora=LoraConfig(rank=4, targets=targets),
    )
    job = job_of(config, HfModelConfig.from_folder(folder))
    for rank in ranks.run(allocated, tp * pp * dp, config):
        stage = rank["stage"]
        assert rank["parameters_elsewhere"] == 0
        assert rank["numel"] == num_parameters(job, stage)
        assert rank["weights"] == weight_bytes(job, stage)
        assert rank["gradients"] == gradient_bytes(job, stage)
        assert 0.9 * optimizer_bytes(job, stage) <= rank["optimizer"] <= optimizer_bytes(job, stage)
