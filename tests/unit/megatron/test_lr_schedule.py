"""Proves the learning rate of every update against the formulas, written out in float64."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from megatron_matpo.config.train import OptimConfig
from megatron_matpo.megatron.memory_policy import offload_options
from megatron_matpo.megatron.optimizer import learning_rate

OPTIM = OptimConfig(lr=8e-4, min_lr=1e-5, warmup_steps=4, decay_steps=20)


def rates(optim: OptimConfig, num: int) -> np.ndarray:
    return np.array([learning_rate(optim, i) for i in range(num)])


def test_warm_up_is_linear_and_then_constant():
    optim = OptimConfig(lr=8.0, warmup_steps=4)
    assert rates(optim, 6).tolist() == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    assert learning_rate(OptimConfig(lr=8.0, warmup_steps=0), 0) == 8.0


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_is_the_formula(schedule, warmup):
    optim = replace(OPTIM, schedule=schedule, warmup_steps=warmup)
    update = np.arange(40, dtype=np.float64)
    progress = np.clip((update - warmup) / (20 - warmup), 0.0, 1.0)
    decayed = {
        "linear": 8e-4 * (1 - progress) + 1e-5 * progress,
        "cosine": 1e-5 + 0.5 * (8e-4 - 1e-5) * (1 + np.cos(np.pi * progress)),
    }[schedule]
    expected = np.where(update < warmup, 8e-4 * (update + 1) / max(warmup, 1), decayed)
    np.testing.assert_allclose(rates(optim, 40), expected, rtol=1e-12, atol=1e-18)
    assert set(rates(optim, 40)[20:]) == {1e-5}
    assert rates(optim, 40).max() == 8e-4


def test_a_length_that_is_left_open_is_the_runs():
    optim = replace(OPTIM, schedule="linear", decay_steps=0)
    assert learning_rate(optim.planned(104), 54) == pytest.approx((8e-4 + 1e-5) / 2)
    assert OPTIM.planned(104) == OPTIM
    # A run that is shorter than its warm-up never decays.
    assert learning_rate(optim.planned(3), 2) == pytest.approx(6e-4)


def test_offload_options_are_megatrons():
    """Names only: Megatron checks the values where Transformer Engine is installed."""
    from megatron.core.optimizer import OptimizerConfig

    assert offload_options(OPTIM) == {}
    options = offload_options(replace(OPTIM, offload=True))
    assert options.keys() <= {field.name for field in fields(OptimizerConfig)}
    assert options["optimizer_offload_fraction"] == 1.0
    assert options["use_precision_aware_optimizer"]
