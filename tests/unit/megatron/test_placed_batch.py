"""How a packed row is padded for a layout, and which rank gets which of its tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_matpo.megatron.batch import empty_micro_batch, place, zigzag
from megatron_matpo.megatron.parallel import ParallelState
from tests.helpers.tiny import make_batch


def state(tp=1, cp_rank=0, cp=1):
    return ParallelState(0, 1, 0, tp, 0, 1, 0, 1, cp_rank, cp, torch.device("cpu"))


def test_without_a_layout_nothing_is_padded():
    batch = make_batch((3, 9), 0)
    placed = place(batch, state())
    assert placed.segments == batch.lengths == placed.batch.lengths
    assert placed.max_seqlen == max(batch.lengths)
    assert placed.cu_seqlens.dtype == torch.int32
    assert placed.cu_seqlens.tolist()[0] == 0 and placed.cu_seqlens.diff().tolist() == [
        *batch.lengths
    ]
    for name, value in batch.tensors().items():
        assert torch.equal(placed.batch.tensors()[name], value), name


def test_the_order_of_chunks_is_transformer_engines():
    """Two samples of 8 over 2 ranks: rank 0 has the first and last quarter, rank 1 the middle."""
    assert zigzag([8, 8], 0, 2).tolist() == [0, 1, 6, 7, 8, 9, 14, 15]
    assert zigzag([8, 8], 1, 2).tolist() == [2, 3, 4, 5, 10, 11, 12, 13]
    with pytest.raises(AssertionError, match="6 tokens does not make 4 chunks"):
        zigzag([6], 0, 2)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 6), st.integers(2, 30)),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3]),
)
def test_every_token_is_on_one_rank_and_padding_is_not_trained(shape, tp, cp):
    batch = make_batch(shape, 0)
    parts = [place(batch, state(tp, rank, cp)) for rank in range(cp)]
    (segments,) = {part.segments for part in parts}
    for length, segment in zip(batch.lengths, segments, strict=False):
        assert length <= segment < length + max(1, 2 * cp)
    if len(segments) > len(batch.lengths):
        assert len(segments) == len(batch.lengths) + 1
    assert all(segment % (2 * cp if cp > 1 else 1) == 0 for segment in segments)
    seen = torch.cat([part.source for part in parts])
    assert sorted(seen[seen >= 0].tolist()) == list(range(sum(batch.lengths)))
    for part in parts:
        assert len(part.source) == sum(segments) // cp and len(part.source) % tp == 0
        is_real = part.source >= 0
        tensors = part.batch.tensors()
        owners = torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths))
        index = tensors.pop("sample_index")
        assert torch.equal(index[is_real], owners[part.source[is_real]])
        assert bool((index[~is_real] == -1).all())
        for name, value in tensors.items():
            assert torch.equal(value[is_real], batch.tensors()[name][part.source[is_real]]), name
            assert not value[~is_real].any(), name


def test_an_empty_micro_batch_fits_every_layout():
    placed = place(empty_micro_batch(), state(tp=4, cp_rank=1, cp=2))
    assert placed.segments == (4, 4) and placed.source.tolist() == [-1] * 4
    assert place(empty_micro_batch(), state()).segments == (1,)
