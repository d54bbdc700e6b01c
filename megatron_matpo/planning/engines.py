"""Memory of one GPU of an engine: weights and KV cache.

Source: SGLang's documentation of `--mem-fraction-static` (weights and KV cache together take this
share of the GPU's memory; the rest is for activations and graphs) and of
`--max-total-tokens`. KV heads are repeated where there are fewer than the engine has GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.rollout import RolloutConfig

_HALF = 2
"""Bytes of a weight and of a KV entry: engines serve in bf16."""
_GIB = 2**30


@dataclass(frozen=True)
class EngineMemory:
    """One GPU of an engine."""

    weights: int
    """Bytes."""
    kv_cache: int
    """Bytes."""
    sync_buckets: int
    """Bytes, in the part that `mem_fraction` leaves."""
    kv_tokens: int
    """Tokens that the engine's cache holds."""
    full_trajectories: float
    """Trajectories of `rollout.context_length` that fit at the same time."""


def kv_bytes_per_token(hf: HfModelConfig, num_gpus: int) -> int:
    """Keys and values of all layers, on one of an engine's GPUs."""
    heads = max(1, hf.num_kv_heads // num_gpus)
    return 2 * hf.num_layers * heads * hf.head_dim * _HALF


def engine_memory(
    hf: HfModelConfig,
    num_parameters: int,
    rollout: RolloutConfig,
    bucket_mb: int,
    memory_gib: float,
) -> EngineMemory:
    """What one GPU of an engine holds; a negative cache means that the weights do not fit."""
    weights = -(-num_parameters * _HALF // rollout.tensor)
    per_token = kv_bytes_per_token(hf, rollout.tensor)
    room = int(rollout.mem_fraction * memory_gib * _GIB) - weights
    tokens = room // per_token
    if rollout.max_total_tokens:
        tokens = min(tokens, rollout.max_total_tokens)
    return EngineMemory(
        weights=weights,
        kv_cache=tokens * per_token,
        # SGLang 0.5.20 makes the tensors and their flat copy.
        sync_buckets=2 * bucket_mb * 2**20,
        kv_tokens=tokens,
        full_trajectories=tokens / rollout.context_length,
    )


def engine_gpus(config: Config) -> int:
    """GPUs of all engines."""
    rollout = config.rollout
    return 0 if rollout.replay else rollout.num_servers * rollout.tensor


def engine_problems(config: Config, engine: EngineMemory | None) -> Iterator[str]:
    """What of the engines does not fit, one line each; `engine`: None if the GPU is unknown."""
    cluster, rollout = config.cluster, config.rollout
    everything = cluster.num_nodes * cluster.gpus_per_node
    if cluster.device == "cuda" and engine_gpus(config) > everything:
        yield (
            f"engines: rollout.num_servers x rollout.tensor = {rollout.num_servers} x "
            f"{rollout.tensor} = {engine_gpus(config)} GPUs, but there are {cluster.num_nodes} x "
            f"{cluster.gpus_per_node}"
        )
    if cluster.device == "cuda" and rollout.tensor > cluster.gpus_per_node:
        yield f"rollout.tensor={rollout.tensor}: more than the GPUs of a node"
    if engine and engine.full_trajectories < 1:
        yield (
            f"engine: room for {max(0, engine.kv_tokens)} tokens of KV cache, a trajectory may "
            f"have {rollout.context_length}; raise rollout.tensor or rollout.mem_fraction"
        )
