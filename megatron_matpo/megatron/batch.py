"""What one forward pass sees: one packed row, the tokens of its samples one after another.

There is no padding in a `MicroBatch` as callers make it. What tensor and context parallelism need
of it is added by `place`, inside this package, and is gone from what `score` returns.

Letters in shapes: t tokens of the row; of `PlacedBatch`, the tokens of this rank.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_matpo.megatron.parallel import ParallelState


@dataclass(frozen=True)
class MicroBatch:
    """Position i of every tensor is about predicting `labels[i]` from its sample's tokens up to i.

    All tensor-, context- and pipeline-parallel ranks of a data-parallel replica hold the same.
    """

    input_ids: Tensor
    """[t] int64."""
    labels: Tensor
    """[t] int64; any valid id where `loss_mask` is 0."""
    loss_mask: Tensor
    """[t] float32; 0 at prompts, tool replies and padding, where log-probs are left at 0."""
    old_logprobs: Tensor
    """[t] float32."""
    rollout_logprobs: Tensor
    """[t] float32; what the engine reported."""
    advantages: Tensor
    """[t] float32."""
    loss_weights: Tensor
    """[t] float32; the loss mask times the weight of the sample's trained tokens."""
    is_worker: Tensor
    """[t] float32; 1 for the tokens of workers, 0 for planners' and padding."""
    lengths: tuple[int, ...]
    """Tokens of each sample, in order; the sum is t."""
    reference_logprobs: Tensor | None = None
    """[t] float32; of the initial policy, if the loss has a KL penalty."""
    is_current: Tensor | None = None
    """[t] float32; 0 where older weights than the trained ones sampled the token. None: nowhere."""
    sample_ids: tuple[str, ...] = ()
    """One per sample; empty for padding micro-batches."""
    sample_index: Tensor | None = None
    """[t] int64; whose each token is, -1 for padding. Set by `place`: in padded and cut rows
    `lengths` does not tell."""

    def to(self, device: torch.device) -> MicroBatch:
        """A copy whose tensors are on `device`; itself if they are already."""
        if self.input_ids.device == device:
            return self
        return dataclasses.replace(
            self,
            **{k: v.to(device, non_blocking=True) for k, v in self.tensors().items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """The fields with one value per token."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }


def empty_micro_batch(device: torch.device | None = None) -> MicroBatch:
    """One untrained token: evens out the number of micro-batches of data-parallel ranks."""
    ids = torch.zeros(1, dtype=torch.long, device=device)
    zeros = torch.zeros(1, device=device)
    return MicroBatch(ids, ids, zeros, zeros, zeros, zeros, zeros, zeros, (1,))


@dataclass(frozen=True)
class PlacedBatch:
    """A micro-batch as one rank of a replica computes it."""

    batch: MicroBatch
    """Its tensors hold the tokens of this rank; its `lengths` are those before padding."""
    segments: tuple[int, ...]
    """Lengths that attention sees, over all context-parallel ranks: the samples', padded, and at
    last one of padding alone, if the row needs it."""
    source: Tensor
    """[t] int64: where in the micro-batch each token of this rank comes from; -1 for padding."""

    @property
    def cu_seqlens(self) -> Tensor:
        """[segments + 1] int32 on the tokens' device: where each segment begins, and the end."""
        starts = list(itertools.accumulate(self.segments, initial=0))
        return torch.tensor(starts, dtype=torch.int32, device=self.source.device)

    @property
    def max_seqlen(self) -> int:
        """The longest segment, exactly: Megatron's rotary embedding compares it with the whole."""
        return max(self.segments)


def place(batch: MicroBatch, state: ParallelState, num_tokens: int = 0) -> PlacedBatch:
    """Pad for the layout, and keep this rank's tokens.

    Each sample is padded at its end to `state.sample_multiple` tokens, the row by one segment more
    to `state.row_multiple`, and to `num_tokens` (another multiple of it) if it is shorter. Causal
    attention makes that harmless: no real token sees padding, and padding is not trained. Under
    context parallelism of size c each segment is cut into 2c equal chunks, and rank r has chunks r
    and 2c - 1 - r, which makes the work of causal attention equal; it is the order that Transformer
    Engine expects of packed rows.
    """
    segments = padded_lengths(batch.lengths, state.sample_multiple, state.row_multiple)
    if num_tokens > sum(segments):
        segments = (*segments, num_tokens - sum(segments))
    device = batch.input_ids.device
    source = _sources(batch.lengths, segments)[zigzag(segments, state.cp_rank, state.cp_size)]
    source = source.to(device)
    is_real, index = source >= 0, source.clamp(min=0)
    mine = {name: value[index].where(is_real, 0) for name, value in batch.tensors().items()}
    numbers = torch.arange(len(batch.lengths), device=device)
    owners = numbers.repeat_interleave(torch.tensor(batch.lengths, device=device))
    mine["sample_index"] = owners[index].where(is_real, -1)
    return PlacedBatch(dataclasses.replace(batch, **mine), segments, source)


def row_tokens(batch: MicroBatch, state: ParallelState) -> int:
    """Tokens of the placed row over all context-parallel ranks, padding included."""
    return sum(padded_lengths(batch.lengths, state.sample_multiple, state.row_multiple))


def padded_lengths(
    lengths: Sequence[int], sample_multiple: int, row_multiple: int
) -> tuple[int, ...]:
    """Padded lengths of the samples, and of the padding after them."""
    segments = [-(-length // sample_multiple) * sample_multiple for length in lengths]
    rest = -sum(segments) % row_multiple
    return (*segments, rest) if rest else tuple(segments)


def _sources(lengths: Sequence[int], segments: Sequence[int]) -> Tensor:
    """[sum of segments] int64: where each token of the padded row is in that of samples, or -1."""
    sources = torch.full((sum(segments),), -1)
    start = padded = 0
    for length, segment in zip(lengths, segments, strict=False):
        sources[padded : padded + length] = torch.arange(start, start + length)
        start, padded = start + length, padded + segment
    return sources


def zigzag(segments: Sequence[int], cp_rank: int, cp_size: int) -> Tensor:
    """[t] int64: places in the padded row of a context-parallel rank's tokens, in its order."""
    if cp_size == 1:
        return torch.arange(sum(segments))
    places: list[Tensor] = []
    start = 0
    for length in segments:
        chunk, rest = divmod(length, 2 * cp_size)
        assert rest == 0, f"a segment of {length} tokens does not make {2 * cp_size} chunks"
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            places.append(torch.arange(chunk) + start + number * chunk)
        start += length
    return torch.cat(places)
