"""Proves what `optim` and `train` refuse, and with which words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.config.validate import check_values


@pytest.mark.parametrize(
    ("section", "changes", "expected"),
    [
        ("optim", {"schedule": "step"}, "optim.schedule=step: expected one of constant, linear"),
        ("optim", {"lr": 1e-5, "min_lr": 1e-4}, "optim.min_lr=0.0001: must be at most optim.lr"),
        ("optim", {"warmup_steps": 9, "decay_steps": 9}, "optim.decay_steps=9: counts the warm-up"),
        ("optim", {"offload": True}, "optim.offload=true: on the CPU platform"),
        ("train", {"recompute": "half"}, "train.recompute=half: expected one of none, selective"),
        ("train", {"on_non_finite": "warn"}, "train.on_non_finite=warn: expected one of stop"),
        ("train", {"max_skipped_updates": 0}, "train.max_skipped_updates=0: must be at least 1"),
        ("train", {"peak_tflops": -1.0}, "train.peak_tflops=-1.0: must be at least 0"),
    ],
)
def test_what_is_refused(section, changes, expected):
    config = Config()
    config = replace(config, **{section: replace(getattr(config, section), **changes)})
    (problem,) = check_values(config)
    assert problem.startswith(expected)


def test_offload_on_a_gpu_needs_bf16():
    config = replace(
        Config(),
        cluster=ClusterConfig(gpus_per_node=1),
        optim=replace(Config().optim, offload=True),
    )
    assert check_values(config) == []
    (problem,) = check_values(replace(config, precision="fp32"))
    assert problem.startswith("optim.offload=true: needs bf16 parameters")
