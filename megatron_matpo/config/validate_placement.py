"""Trainer and engines on the same devices, and memory that they share: what fits together."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_matpo.config.plan import place
from megatron_matpo.config.root import Config


def check_shared(config: Config) -> Iterator[str]:
    """Violations of a training run with engines."""
    if config.cluster.placement == "colocated":
        yield from _check_colocated(config)
    elif config.transport == "ipc" and config.cluster.device == "cuda":
        yield (
            "weight_sync.transport=ipc: on GPUs an engine opens memory of its own device, so it "
            "needs cluster.placement=colocated; use auto or broadcast"
        )
    if (
        config.transport == "ipc"
        and config.cluster.device == "cpu"
        and config.cluster.num_nodes > 1
    ):
        yield (
            f"weight_sync.transport=ipc: on CPUs trainer rank 0 and all engines must be on one "
            f"machine, cluster.num_nodes={config.cluster.num_nodes}; use broadcast or disk"
        )


def _check_colocated(config: Config) -> Iterator[str]:
    cluster, transport = config.cluster, config.transport
    if transport == "none":
        yield (
            "weight_sync.transport=none: colocated engines lose their weights in every step and "
            "need a push; use cluster.placement=disaggregated"
        )
    if cluster.device != "cuda":
        return
    if transport == "broadcast":
        yield (
            "weight_sync.transport=broadcast: NCCL refuses two processes on one GPU; with "
            "cluster.placement=colocated use auto, ipc or disk"
        )
    placement = place(config)
    for slot in placement.engines:
        ranks = placement.trainer_ranks_per_node[slot.node]
        if transport == "ipc" and slot.gpus and max(slot.gpus) >= ranks:
            yield (
                f"cluster.placement=colocated: engine {slot.index} is on GPUs "
                f"{slot.gpus[0]} to {slot.gpus[-1]} of node {slot.node}, which has {ranks} trainer "
                "ranks (parallel.*): every GPU of an engine needs one; lower rollout.num_servers "
                "or raise parallel.data"
            )
            return
