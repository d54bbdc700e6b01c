"""The memory of a trainer GPU by kind, for every pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_matpo.planning.activations import head_bytes, stage_activation_bytes
from megatron_matpo.planning.parameters import (
    gradient_bytes,
    host_bytes,
    optimizer_bytes,
    weight_bytes,
)
from megatron_matpo.planning.shape import Job

RESERVE = 4 * 2**30
"""An assumption, until a peak is measured on the cluster (`memory/peak_gib`): CUDA context and NCCL
buffers, workspaces of cuBLAS and Transformer Engine, and what the allocator cannot use."""


@dataclass(frozen=True)
class Ledger:
    """Bytes of one GPU of one pipeline stage."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    """Output layer and log-probs."""
    weight_sync: int
    """Only while weights are pushed, when there are no activations."""
    reserve: int
    host: int
    """Of the machine's memory, for this rank; not in the total."""

    @property
    def static(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Peak: training or weight push, whichever is more."""
        moving = max(self.activations + self.head, self.weight_sync)
        return self.static + moving + self.reserve


def stage_ledger(job: Job, stage: int, num_micro_batches: int) -> Ledger:
    """One stage."""
    is_last = stage == job.layout.pipeline - 1
    return Ledger(
        stage=stage,
        weights=weight_bytes(job, stage),
        gradients=gradient_bytes(job, stage),
        optimizer=optimizer_bytes(job, stage),
        activations=stage_activation_bytes(job, stage, num_micro_batches),
        head=head_bytes(job) if is_last else 0,
        weight_sync=sync_bytes(job),
        reserve=0 if job.is_local else RESERVE,
        host=host_bytes(job, stage),
    )


def worst_stage(job: Job, num_micro_batches: int) -> Ledger:
    """The stage that needs most."""
    stages = range(job.layout.pipeline)
    ledgers = [stage_ledger(job, stage, num_micro_batches) for stage in stages]
    return max(ledgers, key=lambda ledger: ledger.total)


def sync_bytes(job: Job) -> int:
    """A push, on trainer rank 0: two buckets, and the largest tensor twice (parts, then whole)."""
    hf = job.hf
    largest = max(hf.vocab_size, hf.ffn_size) * hf.hidden_size * job.element_bytes
    return 2 * job.bucket_mb * 2**20 + 2 * largest
