"""Transformer Engine's attention and ours agree on packed rows, in bf16, with gradients.

Proved where there is a CUDA device with Transformer Engine: both are the float64 formula within
bf16's rounding, so that what the CPU tests prove of packed rows is what a GPU computes. Not proved:
context parallelism over NCCL.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SEGMENTS = [700, 1, 257, 64, 2]
HEADS, KV_HEADS, D = 8, 2, 64


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(SEGMENTS), heads, D) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    rows = [torch.randn(shape, generator=generator) for shape in shapes]
    return [row.to("cuda", torch.bfloat16).requires_grad_() for row in rows]


def ours(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_matpo.megatron.attention import PackedAttention

    config: Any = SimpleNamespace(kv_channels=D, window_size=None, context_parallel_size=1)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
    core = PackedAttention(config, layer_number=1)
    return core(query, key, value, None, packed_seq_params=params)


def transformer_engines(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    te = pytest.importorskip("transformer_engine.pytorch")
    core = te.DotProductAttention(HEADS, D, num_gqa_groups=KV_HEADS, attention_dropout=0.0)
    return core(
        query,
        key,
        value,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=max(SEGMENTS),
        max_seqlen_kv=max(SEGMENTS),
    ).flatten(1)


def formula(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    outputs = []
    for start, stop in pairwise(starts.tolist()):
        q, k, v = (x[start:stop].double().transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=0) for x in (k, v))
        future = torch.ones(stop - start, stop - start, device=q.device).triu(1).bool()
        scores = (q @ k.transpose(1, 2) * D**-0.5).masked_fill(future, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs).flatten(1)


@pytest.mark.parametrize("attention", [ours, transformer_engines])
def test_a_packed_row_is_the_formula(attention):
    starts = torch.tensor([0, *SEGMENTS], device="cuda").cumsum(0).int()
    inputs = tensors()
    actual, expected = attention(*inputs, starts), formula(*inputs, starts)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=2e-2)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to("cuda")
    got = torch.autograd.grad((actual.float() * weights).sum(), inputs)
    want = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=5e-2, atol=5e-2)
