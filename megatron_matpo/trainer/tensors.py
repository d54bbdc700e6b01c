"""Micro-batches of samples as padded tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_matpo.megatron.batch import MicroBatch, empty_micro_batch
from megatron_matpo.types import Role, TrainSample


def to_micro_batch(samples: list[TrainSample], device: torch.device) -> MicroBatch:
    """Right-pad `samples` to the longest; an empty list becomes one masked token.

    Causal attention makes right padding harmless: no real position sees a padded one.
    """
    if not samples:
        return empty_micro_batch(device)
    width = max(len(sample.input_ids) for sample in samples)

    def padded(rows: list[list[int]] | list[list[float]], dtype: torch.dtype) -> Tensor:
        filled = [[*row, *([0] * (width - len(row)))] for row in rows]
        return torch.tensor(filled, dtype=dtype, device=device)

    def column(values: list[float]) -> Tensor:
        return torch.tensor([[value] for value in values], dtype=torch.float32, device=device)

    masks = padded([[float(bit) for bit in sample.loss_mask] for sample in samples], torch.float32)
    rollout_logprobs = padded([sample.rollout_logprobs for sample in samples], torch.float32)
    advantages = column([sample.advantage for sample in samples]).expand(len(samples), width)
    if any(sample.advantage_mask is not None for sample in samples):
        kept = [sample.advantage_mask or [1] * len(sample.labels) for sample in samples]
        advantages = advantages * padded(kept, torch.float32)
    weights = [sample.loss_weight for sample in samples]
    return MicroBatch(
        input_ids=padded([sample.input_ids for sample in samples], torch.long),
        labels=padded([sample.labels for sample in samples], torch.long),
        position_ids=torch.arange(width, device=device).expand(len(samples), width),
        loss_mask=masks,
        old_logprobs=rollout_logprobs,
        rollout_logprobs=rollout_logprobs,
        advantages=advantages,
        loss_weights=masks if set(weights) == {1.0} else masks * column(weights),
        is_worker=column([float(sample.role is Role.WORKER) for sample in samples]),
        sample_ids=tuple(sample.trajectory_id for sample in samples),
    )
