"""Proves the rates of a step from its samples, its time and the devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_matpo.config.flops import Shape, training_flops
from megatron_matpo.config.train import ParallelConfig
from megatron_matpo.trainer.throughput import Throughput
from megatron_matpo.types import Role, TrainSample
from tests.helpers.tiny import make_tiny_model, tiny_config

SHAPE = Shape(2, 8, 16, 4, 24, 101)


def sample(role: Role, length: int, trained: int) -> TrainSample:
    mask = [0] * (length - trained) + [1] * trained
    return TrainSample(
        trajectory_id="t",
        episode_id="e",
        role=role,
        input_ids=[1] * length,
        labels=[1] * length,
        loss_mask=mask,
        rollout_logprobs=[0.0] * length,
        advantage=1.0,
    )


SAMPLES = [sample(Role.PLANNER, 9, 4), sample(Role.WORKER, 6, 5), sample(Role.WORKER, 3, 1)]


def test_rates_of_a_step():
    flops = training_flops(SHAPE, [9, 6, 3], 10)
    values = Throughput(SHAPE, num_devices=4, peak_flops=1e6).metrics(SAMPLES, 2.0)
    assert values == {
        "train/tokens_per_s": 9.0,
        "train/tflops_per_device": pytest.approx(flops / 2 / 4 / 1e12),
        "train/mfu": pytest.approx(flops / 2 / 4 / 1e6),
        "tokens/trained/planner": 4,
        "tokens/trained/worker": 6,
    }


def test_without_a_known_peak_there_is_no_mfu(tmp_path):
    """The CPU has none unless it is set."""
    config = tiny_config(make_tiny_model(tmp_path / "model", tied=True))
    config = replace(config, parallel=ParallelConfig(tensor=2, data=2))
    speed = Throughput.of(config)
    assert speed.num_devices == 4 and "train/mfu" not in speed.metrics(SAMPLES, 1.0)
    config = replace(config, train=replace(config.train, peak_tflops=0.5))
    assert Throughput.of(config).peak_flops == 0.5e12
