"""Micro-batches of samples as packed tensors."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from megatron_matpo.megatron.batch import MicroBatch, empty_micro_batch
from megatron_matpo.types import Role, TrainSample


def to_micro_batch(samples: list[TrainSample], device: torch.device) -> MicroBatch:
    """The samples' tokens one after another; an empty list becomes one masked token."""
    if not samples:
        return empty_micro_batch(device)

    def row(values: Iterable[Iterable[float]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(chain.from_iterable(values)), dtype=dtype, device=device)

    def spread(values: Iterable[float]) -> Tensor:
        """One value per sample, at each of its tokens."""
        return torch.tensor(list(values), device=device).repeat_interleave(counts)

    lengths = tuple(len(sample.input_ids) for sample in samples)
    counts = torch.tensor(lengths, device=device)
    masks = row((sample.loss_mask for sample in samples), torch.float32)
    rollout_logprobs = row((sample.rollout_logprobs for sample in samples), torch.float32)
    advantages = spread(sample.advantage for sample in samples)
    if any(sample.advantage_mask is not None for sample in samples):
        kept = (sample.advantage_mask or [1] * len(sample.labels) for sample in samples)
        advantages = advantages * row(kept, torch.float32)
    is_current = None
    if any(sample.is_current is not None for sample in samples):
        flags = (sample.is_current or [1] * len(sample.labels) for sample in samples)
        is_current = row(flags, torch.float32)
    return MicroBatch(
        input_ids=row((sample.input_ids for sample in samples), torch.long),
        labels=row((sample.labels for sample in samples), torch.long),
        loss_mask=masks,
        old_logprobs=rollout_logprobs,
        rollout_logprobs=rollout_logprobs,
        advantages=advantages,
        loss_weights=masks * spread(sample.loss_weight for sample in samples),
        is_worker=spread(float(sample.role is Role.WORKER) for sample in samples),
        lengths=lengths,
        sample_ids=tuple(sample.trajectory_id for sample in samples),
        is_current=is_current,
    )
