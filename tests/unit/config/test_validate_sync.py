"""Proves which engines are refused because they could not take new weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.validate import collect_violations


@pytest.mark.parametrize("arguments", [["--quantization", "fp8"], ["--quantization=fp8"]])
def test_a_run_that_pushes_weights_refuses_engines_that_quantize(arguments):
    config = replace(
        Config(), rollout=replace(Config().rollout, engine_args=["--enable-metrics", *arguments])
    )

    def told(command):
        problems = collect_violations(config, command=command)
        return [p for p in problems if p.startswith("rollout.engine_args has --quantization")]

    assert len(told("train")) == 1
    assert told("eval") == [], "an evaluation serves the weights that the engine loads itself"
