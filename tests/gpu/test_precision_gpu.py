"""FP8 trains like bf16 on the GPU at hand, for every recipe that it has.

Skipped without CUDA; docs/gpu_results.md says whether and when this was run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_matpo.config import Config
from megatron_matpo.config.precision import FP8_RECIPES, Platform, decide_precision
from megatron_matpo.errors import ConfigError
from megatron_matpo.megatron.batch import MicroBatch
from megatron_matpo.megatron.precision import resolve_precision, this_platform
from tests.helpers.gpu_actor import gpu_actor, gpu_config, learnable_batch, make_gpu_model

pytestmark = pytest.mark.gpu

TOKENS, UPDATES = 1024, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gpu_model(tmp_path_factory.mktemp("gpu") / "model")


@pytest.fixture(scope="module")
def bf16_losses(folder: Path) -> list[float]:
    return losses(gpu_config(folder, "bf16"))


def negative_mean(
    logprobs: Tensor, entropy: Tensor, batch: MicroBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    return -(logprobs * batch.loss_mask).sum() / TOKENS, {}


def losses(config: Config) -> list[float]:
    with gpu_actor(config) as actor:
        batch = learnable_batch(TOKENS, 0)
        return [actor.update([batch], negative_mean, i).loss for i in range(UPDATES)]


def test_bf16_learns(bf16_losses: list[float]) -> None:
    assert bf16_losses[-1] < 0.8 * bf16_losses[0]


@pytest.mark.parametrize("recipe", sorted(FP8_RECIPES))
def test_fp8_follows_bf16(recipe: str, folder: Path, bf16_losses: list[float]) -> None:
    config = gpu_config(folder, "fp8", recipe)
    try:
        resolve_precision(config)
    except ConfigError as error:
        pytest.skip(str(error))
    mine = losses(config)
    # The first loss is before any update: the distance is the rounding of one forward pass.
    assert mine[0] == pytest.approx(bf16_losses[0], rel=0.02)
    # On a CPU, bf16's curve is up to 5 % of the first loss away from fp32's.
    assert mine == pytest.approx(bf16_losses, abs=0.1 * bf16_losses[0])
    assert mine != bf16_losses, "FP8 was not used"


def test_the_driver_is_asked(folder: Path) -> None:
    platform = this_platform("cuda")
    assert platform.capability == torch.cuda.get_device_capability()
    expected = decide_precision(gpu_config(folder, "auto"), Platform(*vars(platform).values()))
    assert resolve_precision(gpu_config(folder, "auto")) == expected
