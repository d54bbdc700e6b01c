"""Trainer and engines on the same GPUs, in turns: what is on a GPU in each phase of a step.

The order of a step, besides what is both processes' own (CUDA context, NCCL, workspaces):

    train     the trainer whole: weights, gradients, optimizer, activations
    push      the trainer's weights and a bucket; the engine's weights
    roll out  the trainer's weights; the engine's weights and KV cache

Engines give weights and KV cache back before training and take the weights first, then the cache
(SGLang's memory saver: `/release_memory_occupation` and `/resume_memory_occupation` with tags).
Between updates gradient buffers hold nothing that is needed and are given back; the optimizer's
part goes to the host. The trainer's weights stay: the push reads them, and they are the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_matpo.planning.engines import EngineMemory
from megatron_matpo.planning.ledger import Ledger

ENGINE_REST = 4 * 2**30
"""An assumption, until it is measured: CUDA context, NCCL, graphs and workspaces of an engine's
process, which stay when it gives weights and cache back. For comparison: a Megatron trainer that
gives its memory back keeps 3 to 5 GB in slime v0.1.0, and kept 15 to 18 before (release notes)."""


@dataclass(frozen=True)
class Phase:
    """What one GPU holds in one phase, bytes."""

    name: str
    trainer: int
    engine: int

    @property
    def total(self) -> int:
        """Of the GPU."""
        return self.trainer + self.engine


def phases(ledger: Ledger, engine: EngineMemory) -> tuple[Phase, ...]:
    """The phases of a step, in their order."""
    idle = ledger.weights + ledger.reserve
    return (
        Phase("train", ledger.total, ENGINE_REST),
        Phase("push", idle + ledger.weight_sync, ENGINE_REST + engine.weights),
        Phase("rollout", idle, ENGINE_REST + engine.weights + engine.kv_cache),
    )


def peak_bytes(ledger: Ledger, engine: EngineMemory | None) -> int:
    """The most that a trainer's GPU holds; `engine`: what shares it, if anything does."""
    return max(phase.total for phase in phases(ledger, engine)) if engine else ledger.total


def host_bytes(ledger: Ledger, engine: EngineMemory | None) -> int:
    """In the host's memory, per rank: with an engine on the same GPU also the optimizer's part."""
    return ledger.host + (ledger.optimizer if engine else 0)
