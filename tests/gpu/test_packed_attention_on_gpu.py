"""Transformer Engine's attention and ours agree on packed rows, in bf16, with gradients.

Proved where there is a CUDA device with Transformer Engine: both, and the padded and the sample by
sample form that `benchmarks/gpu_actor.py` compares them with, are the float64 formula within bf16's
rounding, so that what the CPU tests prove of packed rows is what a GPU computes. Not proved:
context parallelism over NCCL.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import gpu_attention
from tests.helpers.gpu_attention import Heads, formula, offsets, random_row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SEGMENTS = [700, 1, 257, 64, 2]
HEADS = Heads(8, 2, 64)


@pytest.mark.parametrize("name", ["ours", "engines", "engines_alone", "engines_padded"])
def test_a_packed_row_is_the_formula(name):
    if name != "ours":
        pytest.importorskip("transformer_engine.pytorch")
    attention = getattr(gpu_attention, name)(HEADS)
    starts, inputs = offsets(SEGMENTS), random_row(HEADS, SEGMENTS)
    actual, expected = attention(*inputs, starts), formula(HEADS)(*inputs, starts)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=2e-2)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to("cuda")
    got = torch.autograd.grad((actual.float() * weights).sum(), inputs)
    want = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=5e-2, atol=5e-2)
