"""What one forward pass sees. Shapes: b sequences, s tokens (the longest of the micro-batch).

Micro-batches are rectangular and padded on the right. Attention is causal, so what stands right of
a token never reaches it, and padded positions have a loss mask of 0.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Position t of every field is about predicting `labels[:, t]` from `input_ids[:, :t+1]`.

    All tensor- and pipeline-parallel ranks of a data-parallel replica hold the same values.
    """

    input_ids: Tensor
    """[b, s] int64."""
    labels: Tensor
    """[b, s] int64; any valid id where `loss_mask` is 0."""
    position_ids: Tensor
    """[b, s] int64; 0 .. s-1 in every row."""
    loss_mask: Tensor
    """[b, s] float32; 0 at prompts, tool replies and padding, where log-probs are left at 0."""
    old_logprobs: Tensor
    """[b, s] float32."""
    rollout_logprobs: Tensor
    """[b, s] float32; what the engine reported."""
    advantages: Tensor
    """[b, s] float32."""
    loss_weights: Tensor
    """[b, s] float32; the loss mask times the weight of the row's trained tokens."""
    is_worker: Tensor
    """[b, 1] float32; 1 for the rows of workers, 0 for planners and padding."""
    reference_logprobs: Tensor | None = None
    """[b, s] float32; of the initial policy, if the loss has a KL penalty."""
    sample_ids: tuple[str, ...] = ()
    """One per row; empty for padding micro-batches."""

    def to(self, device: torch.device) -> MicroBatch:
        """A copy whose tensors are on `device`; itself if they are already."""
        if self.input_ids.device == device:
            return self
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def empty_micro_batch(device: torch.device | None = None, num_tokens: int = 1) -> MicroBatch:
    """Untrained tokens: evens out the number of micro-batches of data-parallel ranks."""
    ids = torch.zeros(1, num_tokens, dtype=torch.long, device=device)
    positions = torch.arange(num_tokens, device=device).unsqueeze(0)
    zeros = torch.zeros(1, num_tokens, device=device)
    worker = torch.zeros(1, 1, device=device)
    return MicroBatch(ids, ids, positions, zeros, zeros, zeros, zeros, zeros, worker)
