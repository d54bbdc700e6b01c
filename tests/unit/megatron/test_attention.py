"""The CPU's core attention against the formula in float64, one sample at a time, with gradients.

Not proved here: context parallelism, and that Megatron hands over the right tensors (tests/dist).
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from megatron_matpo.megatron import cpu_backend

cpu_backend.install()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402  (after `install`)

from megatron_matpo.megatron.attention import PackedAttention  # noqa: E402

SEGMENTS = [5, 1, 17, 3, 8]


def row(segments, seed, heads=4, kv_heads=2, d=8):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(segments), n, d) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def core(window_size=None, layer_number=1, skip=None, scale=None):
    config = SimpleNamespace(
        kv_channels=8, window_size=window_size, window_attn_skip_freq=skip, context_parallel_size=1
    )
    return PackedAttention(config, layer_number=layer_number, softmax_scale=scale)  # type: ignore[arg-type]


def run(attention, tensors, segments):
    starts = torch.tensor([0, *segments]).cumsum(0).int()
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
    return attention(*tensors, None, packed_seq_params=params)


def oracle(tensors, segments, window=None, scale=8**-0.5):
    """Softmax over the keys that a query may see; every kv head serves two query heads."""
    query, key, value = (tensor.double() for tensor in tensors)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    outputs = []
    bounds = torch.tensor([0, *segments]).cumsum(0).tolist()
    for start, stop in pairwise(bounds):
        for i in range(start, stop):
            first = start if window is None else max(start, i - window)
            scores = torch.einsum("hd,khd->hk", query[i], key[first : i + 1]) * scale
            outputs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value[first : i + 1]))
    return torch.stack(outputs).flatten(1)


def check(attention, segments, **options):
    tensors = row(segments, 0)
    actual, expected = run(attention, tensors, segments), oracle(tensors, segments, **options)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((actual * weights).sum(), tensors)
    want = torch.autograd.grad((expected * weights).sum(), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("segments", [SEGMENTS, [34], [1] * 6], ids=str)
def test_a_token_sees_its_sample_up_to_itself(segments):
    check(core(), segments)


@pytest.mark.parametrize("window", [0, 1, 4, 7, 16, 100])
def test_a_window_limits_how_far_back(window):
    check(core(window_size=(window, 0)), SEGMENTS, window=window)


def test_layers_without_the_window():
    """Every second layer is one in Megatron's convention: layer numbers count from 1."""
    check(core(window_size=(2, 0), skip=2, layer_number=2), SEGMENTS)
    check(core(window_size=(2, 0), skip=2, layer_number=1), SEGMENTS, window=2)
    check(core(window_size=(-1, 0)), SEGMENTS)


def test_the_scale_can_be_given():
    check(core(scale=0.3), SEGMENTS, scale=0.3)


def test_what_is_not_a_packed_row_is_refused():
    tensors = row(SEGMENTS, 0)
    with pytest.raises(AssertionError):
        core()(*tensors, None)
    with pytest.raises(AssertionError, match="causal inside a sample"):
        params = PackedSeqParams(cu_seqlens_q=torch.tensor([0, 34]))
        core()(*tensors, torch.ones(34, 34), packed_seq_params=params)
