"""Violations of asynchronous rollout, `rollout.max_staleness >= 1`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_matpo.config.root import Config


def check_async(config: Config) -> Iterator[str]:
    """What would train on tokens of other weights without a correction, or cannot overlap."""
    rollout, algo = config.rollout, config.algo
    stale = f"rollout.max_staleness={rollout.max_staleness}"
    if algo.tis == "off" and algo.old_logprobs == "trainer":
        yield (
            f"algo.tis=off: with {stale} tokens were sampled by older weights than the ratio of "
            "the loss starts from, and nothing would correct for it; use algo.tis=truncate (or "
            "mask), or algo.old_logprobs=engine, where the ratio starts from the engine's own"
        )
    if config.cluster.placement == "colocated":
        yield (
            f"{stale}: with cluster.placement=colocated engines and trainer take turns on the same "
            "GPUs, so nothing can be sampled while the trainer trains; use 0, or "
            "cluster.placement=disaggregated"
        )
    if config.weight_sync.transport == "none":
        yield (
            f"{stale}: with weight_sync.transport=none the engines stay at version 0, which is "
            "too old from the second step after; use rollout.max_staleness=0"
        )
    if rollout.on_update == "in_place" and config.weight_sync.transport not in (
        "broadcast",
        "disk",
    ):
        yield (
            f"rollout.on_update=in_place: with weight_sync.transport="
            f"{config.weight_sync.transport} engines forget their cache at every push; use "
            "broadcast or disk, or rollout.on_update=retract"
        )
