"""The plan's numbers for a mixture of experts, against Qwen3-30B-A3B's published sizes.

Proved: parameters in all and per token (Qwen3's model card: 30.5 B and 3.3 B), what expert
parallelism divides, and that proposals use it. What ranks allocate: `tests/dist/test_ledger.py`.
Not measured: activations of experts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_matpo.config.gpus import find_gpu
from megatron_matpo.config.hf_families import MoeShape
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.planning.activations import expert_bytes_per_token, kept_bytes_per_token
from megatron_matpo.planning.layouts import Site, candidates
from megatron_matpo.planning.parameters import (
    active_parameters,
    num_parameters,
    optimizer_bytes,
    total_parameters,
)
from megatron_matpo.planning.shape import Job, Layout
from tests.helpers.planning_jobs import bf16_job

HF = HfModelConfig(
    folder="Qwen3-30B-A3B",
    architecture="Qwen3MoeForCausalLM",
    hidden_size=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    ffn_size=6144,
    vocab_size=151_936,
    rope_theta=1e6,
    rms_eps=1e-6,
    tie_word_embeddings=False,
    max_positions=40_960,
    qkv_bias=False,
    qk_norm=True,
    sliding_window=None,
    rope_scaling=None,
    moe=MoeShape(
        num_experts=128,
        experts_per_token=8,
        ffn_size=768,
        normalize=True,
        layers=(True,) * 48,
    ),
)
WINDOWED = replace(HF, sliding_window=4096)
LAYOUT = Layout(tensor=4, pipeline=1, context=1, data=8, sequence=True)
EXPERTS = 48 * 128 * 3 * 2048 * 768


def job(layout: Layout = LAYOUT) -> Job:
    return bf16_job(HF, layout)


def test_parameters_are_the_published_ones() -> None:
    attention = 2048 * (2 * 4096 + 2 * 512) + 2 * 2048 + 2 * 128
    rest = 48 * (attention + 2048 * 128) + 2 * 151_936 * 2048 + 2048
    assert total_parameters(job()) == rest + EXPERTS
    assert active_parameters(job()) == rest + EXPERTS // 16
    assert total_parameters(job()) / 1e9 == pytest.approx(30.5, abs=0.05)
    assert active_parameters(job()) / 1e9 == pytest.approx(3.3, abs=0.06)


def test_expert_parallelism_divides_experts_alone() -> None:
    """32 ranks: with 8 of them to a set of experts, 4 replicas share an expert's optimizer."""
    alone, split = job(), job(replace(LAYOUT, expert=8))
    assert num_parameters(alone, 0) - num_parameters(split, 0) == EXPERTS - EXPERTS // 8
    dense = num_parameters(alone, 0) - EXPERTS
    for item in (alone, split):
        # All experts over all ranks, whatever the split; the rest over the replicas.
        assert optimizer_bytes(item, 0) == pytest.approx(12 * (EXPERTS / 32 + dense / 8), rel=1e-4)


def test_what_a_token_leaves_at_its_experts() -> None:
    """Eight times: in [h], gate and up [2 m], their product twice, out [h]; router logits twice."""
    sent = 2 * (2048 + 2 * 768 + 2 * 768 + 2048)
    assert expert_bytes_per_token(job()) == (8 * sent + 8 * 128) / 4
    kept = kept_bytes_per_token(job(), is_moe=True)
    recomputed = kept_bytes_per_token(job(replace(LAYOUT, recompute="full")), is_moe=True)
    assert kept > expert_bytes_per_token(job()) > recomputed == 2048 * 2 / 4


def test_candidates_split_no_window_over_context_parallel_ranks() -> None:
    """Transformer Engine cannot."""
    gpu = find_gpu("A800-80G")
    assert gpu is not None
    found = {layout.context for layout in candidates(HF, Site(gpu, 32, 8))}
    windowed = {layout.context for layout in candidates(WINDOWED, Site(gpu, 32, 8))}
    assert found == {1, 2, 4, 8} and windowed == {1}


def test_candidates_split_experts_inside_a_stage() -> None:
    gpu = find_gpu("A800-80G")
    assert gpu is not None
    found = list(candidates(HF, Site(gpu, 32, 8)))
    assert {layout.expert for layout in found} == {1, 2, 4, 8, 16, 32}
    for layout in found:
        assert layout.world_size == 32
        assert layout.tensor * layout.context * layout.data % layout.expert == 0
