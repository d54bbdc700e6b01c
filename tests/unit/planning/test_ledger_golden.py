"""The plan's numbers for Qwen3-14B against sums made here by hand, from the shape's own figures.

Nothing of the planning code is used on the expected side. What the model really allocates is in
`tests/dist/test_ledger.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.planning.activations import (
    feed_forward_bytes_per_token,
    kept_bytes_per_token,
    layer_bytes_per_token,
    stage_activation_bytes,
)
from megatron_matpo.planning.engines import kv_bytes_per_token
from megatron_matpo.planning.ledger import sync_bytes, worst_stage
from megatron_matpo.planning.parameters import (
    gradient_bytes,
    host_bytes,
    num_parameters,
    optimizer_bytes,
    total_parameters,
    weight_bytes,
)
from megatron_matpo.planning.pipeline import bubble_frac, in_flight_chunks
from megatron_matpo.planning.shape import Job, Layout
from tests.helpers.planning_jobs import bf16_job

MODELS = Path(__file__).parents[3] / "recipes" / "models"
# Qwen3-14B: 40 layers; q 40 x 128, k and v 8 x 128 each; SwiGLU 17408; vocabulary 151936, untied.
LAYER_MATRICES = 5120 * 5120 + 5120 * (5120 + 1024 + 1024) + 3 * 5120 * 17408
LAYER_NORMS = 2 * 5120 + 2 * 128
EMBEDDING = 151936 * 5120
QWEN3_14B = HfModelConfig.from_folder(MODELS / "qwen3-14b")


def job(layout: Layout, **changes) -> Job:
    return bf16_job(**{"hf": QWEN3_14B, "layout": layout, **changes})


TP4 = Layout(tensor=4, pipeline=1, context=2, data=8, sequence=True, recompute="selective")
PP4 = Layout(tensor=2, pipeline=4, context=1, data=8, sequence=True, recompute="full")


def test_parameters_of_the_published_models():
    whole = 40 * (LAYER_MATRICES + LAYER_NORMS) + 2 * EMBEDDING + 5120
    assert whole == 14_768_307_200
    assert total_parameters(job(TP4)) == whole
    # 4.02 billion: 36 layers, 32 and 8 heads of 128, SwiGLU 9728, tied.
    small = 36 * (2560 * (4096 + 2048) + 4096 * 2560 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128)
    expected = small + 151936 * 2560 + 2560
    hf = HfModelConfig.from_folder(MODELS / "qwen3-4b")
    assert total_parameters(job(TP4, hf=hf)) == expected == 4_022_468_096


def test_weights_gradients_and_optimizer_of_tensor_parallel_ranks():
    mine = 40 * (LAYER_MATRICES // 4 + LAYER_NORMS) + 2 * EMBEDDING // 4 + 5120
    assert num_parameters(job(TP4), 0) == mine
    # All sizes are multiples of 64, so that only the end is padded, to a multiple of 128.
    padded = -(-mine // 128) * 128
    assert weight_bytes(job(TP4), 0) == 2 * padded
    assert gradient_bytes(job(TP4), 0) == 4 * padded
    assert optimizer_bytes(job(TP4), 0) == 12 * padded // 16
    assert host_bytes(job(TP4), 0) == 0
    offloaded = job(replace(TP4, offload=True), has_reference=True)
    assert optimizer_bytes(offloaded, 0) == 0
    assert host_bytes(offloaded, 0) == 16 * padded // 16 + 2 * mine


def test_fp8_keeps_two_more_bytes_of_every_layer_matrix_or_only_those():
    mine = weight_bytes(job(TP4), 0)
    matrices = 40 * LAYER_MATRICES // 4
    assert weight_bytes(job(TP4, fp8_recipe="blockwise"), 0) == mine + 2 * matrices
    assert weight_bytes(job(TP4, fp8_recipe="blockwise", fp8_params=True), 0) == mine
    some = job(TP4, fp8_recipe="blockwise", fp8_bf16_layers=4)
    assert weight_bytes(some, 0) == mine + 2 * matrices * 36 // 40


def test_stages_hold_their_layers_and_ends():
    layers = 10 * (LAYER_MATRICES // 2 + LAYER_NORMS)
    assert num_parameters(job(PP4), 0) == layers + EMBEDDING // 2
    assert num_parameters(job(PP4), 1) == layers
    assert num_parameters(job(PP4), 3) == layers + EMBEDDING // 2 + 5120


def test_activations_of_a_layer():
    """By hand, in bytes per token of a rank with TP 4 and sequence parallelism."""
    norms = 2 * (2 * 5120 * 2 + 4) / 4
    heads = (5120 + 2048) + 5120 + (5120 + 1024) + 5120
    attention = (heads * 2 + 4 * (40 + 40 + 8)) / 4 + 4 * 128 * 2
    feed_forward = 3 * 17408 * 2 / 4
    none = job(replace(TP4, recompute="none"))
    assert layer_bytes_per_token(none) == norms + attention + feed_forward
    assert kept_bytes_per_token(none) == layer_bytes_per_token(none)
    assert feed_forward_bytes_per_token(none) == feed_forward
    selective = norms / 2 + attention + 5120 * 2 / 4
    assert kept_bytes_per_token(job(TP4)) == selective
    assert kept_bytes_per_token(job(replace(TP4, recompute="full"))) == 5120 * 2 / 4


def test_activations_of_a_stage():
    """Full recomputation, TP 2, PP 4: every layer keeps its input, one layer at a time is whole."""
    per_layer = 5120 * 2 / 2
    norms = 2 * (2 * 5120 * 2 + 4) / 2
    heads = (5120 + 2048) + 5120 + (5120 + 1024) + 5120
    attention = (heads * 2 + 4 * 88) / 2 + 4 * 128 * 2
    layer = norms + attention + 3 * 17408
    backward = (3 * 17408 / 2 + 2 * 5120 / 2 + 2 * 5120) * 2
    for stage, in_flight in enumerate((4, 3, 2, 1)):
        kept = in_flight * 10 * per_layer
        expected = 40960 * (kept + layer - per_layer + backward)
        assert stage_activation_bytes(job(PP4), stage, 20) == pytest.approx(expected, abs=1)


def test_the_worst_stage_is_named():
    ledger = worst_stage(job(PP4), 20)
    assert ledger.stage == 0
    parts = ledger.weights + ledger.gradients + ledger.optimizer + ledger.activations
    assert ledger.head == 0
    assert ledger.total == parts + ledger.reserve
    assert sync_bytes(job(PP4)) == 2 * 128 * 2**20 + 2 * 2 * EMBEDDING


@pytest.mark.parametrize(
    ("pipeline", "virtual", "stage", "count", "expected"),
    [
        (1, 1, 0, 5, 1),
        (4, 1, 0, 20, 4),
        (4, 1, 3, 20, 1),
        (4, 1, 0, 2, 2),
        (4, 2, 0, 20, 11),  # 2 x 3 + 1 x 4, and the one at work
        (4, 2, 3, 20, 5),
        (4, 2, 0, 4, 8),  # no more than there are
    ],
)
def test_micro_batches_in_flight(pipeline, virtual, stage, count, expected):
    layout = Layout(tensor=1, pipeline=pipeline, context=1, data=1, virtual=virtual)
    assert in_flight_chunks(layout, stage, count) == expected


def test_bubble():
    assert bubble_frac(replace(PP4, virtual=1), 9) == pytest.approx(3 / 12)
    assert bubble_frac(replace(PP4, virtual=2), 9) == pytest.approx(3 / 21)
    assert bubble_frac(TP4, 1) == 0


def test_kv_cache():
    hf = HfModelConfig.from_folder(MODELS / "qwen3-14b")
    assert kv_bytes_per_token(hf, 1) == 2 * 40 * 8 * 128 * 2 == 163_840
    assert kv_bytes_per_token(hf, 2) == 81_920
    assert kv_bytes_per_token(hf, 16) == 2 * 40 * 1 * 128 * 2
