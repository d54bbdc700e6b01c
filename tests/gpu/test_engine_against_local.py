"""Transformer Engine's layers on the GPU against the local ones on the CPU and there, whole model.

The local ones are proved against transformers (`tests/dist/test_families.py`), so this is too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_matpo.config.run import ClusterConfig
from tests.helpers.dist import run_ranks
from tests.helpers.gpu_actor import gpu_actor, gpu_config, local_layers, make_gpu_model
from tests.helpers.megatron_ranks import scores_and_update
from tests.helpers.tiny import make_batch, weighted_loss

pytestmark = pytest.mark.gpu

BATCHES = [make_batch((4, 96), 0), make_batch((3, 64), 1)]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 1e-1)])
def test_log_probs_loss_and_gradient_norm_agree(
    tmp_path: Path, precision: str, tolerance: float
) -> None:
    """TF32 products, which Transformer Engine uses for fp32, have about three digits."""
    model = make_gpu_model(tmp_path / "model", layers=2, hidden=256)
    config = gpu_config(model, precision)
    on_cpu = replace(config, cluster=ClusterConfig(), precision="fp32")
    ((expected, wanted),) = run_ranks(scores_and_update, 1, on_cpu, BATCHES)
    with gpu_actor(config) as actor:
        found = actor.score(BATCHES)
        update = actor.update(BATCHES, weighted_loss, 0)
    for (logprobs, entropy), (want, want_entropy) in zip(found, expected, strict=True):
        torch.testing.assert_close(logprobs, want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(entropy, want_entropy, rtol=tolerance, atol=tolerance)
    assert update.loss == pytest.approx(wanted.loss, rel=10 * tolerance, abs=tolerance)
    assert update.grad_norm == pytest.approx(wanted.grad_norm, rel=10 * tolerance)


def test_the_local_layers_run_on_a_gpu_too(tmp_path: Path) -> None:
    """What `benchmarks/gpu_actor.py` takes the speed of."""
    config = gpu_config(make_gpu_model(tmp_path / "model", layers=2, hidden=256), "bf16")
    with gpu_actor(config) as actor:
        expected = actor.score(BATCHES)
    with local_layers(), gpu_actor(config) as actor:
        found = actor.score(BATCHES)
    for (logprobs, _), (want, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(logprobs, want, rtol=1e-1, atol=1e-1)
