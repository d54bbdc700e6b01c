"""Weights and KV cache of engines that share their devices with the trainer.

    serving --release--> released --take_weights--> (push) --take_cache--> serving

Engines are paused all the time from `release` to the end of the push. What they held is lost with
its memory: after `release` there is no old version to go back to.
"""

from __future__ import annotations

from megatron_matpo.weight_sync.engines import Engines

WEIGHTS, KV_CACHE = "weights", "kv_cache"
"""SGLang's tags. Its third one, graphs, stays."""


class EngineMemory:
    """What the engines have given back; nothing if they have devices of their own."""

    def __init__(self) -> None:
        """Engines hold everything when they start."""
        self._away: set[str] = set()

    @property
    def has_weights(self) -> bool:
        """Whether the engines hold weights."""
        return WEIGHTS not in self._away

    async def release(self, engines: Engines) -> None:
        """Pause all engines, and have them give weights and cache back.

        Raises:
            WeightSyncError: an engine refused, or did not answer in time.
        """
        # Also of one that fails: it is not known what it holds.
        self._away = {WEIGHTS, KV_CACHE}
        await engines.all("pausing", lambda e: e.pause(mode="abort", deadline_s=engines.request_s))
        # A request that has ended for its client can be in the scheduler's last batch for a moment,
        # and a scheduler that is not idle would be ended by an assertion.
        await engines.all("waiting for idle", lambda e: e.wait_idle(deadline_s=engines.request_s))
        await engines.all(
            "releasing memory",
            lambda e: e.release_memory(tags=[KV_CACHE, WEIGHTS], deadline_s=engines.request_s),
        )

    async def take_weights(self, engines: Engines) -> None:
        """Give engines that have none room for weights.

        Raises:
            WeightSyncError: an engine refused, or did not answer in time.
        """
        await self._take(WEIGHTS, engines)

    async def take_cache(self, engines: Engines) -> None:
        """Give them their KV cache back.

        Raises:
            WeightSyncError: an engine refused, or did not answer in time.
        """
        await self._take(KV_CACHE, engines)

    async def _take(self, tag: str, engines: Engines) -> None:
        if tag not in self._away:
            return
        await engines.all(
            f"taking memory for {tag}",
            lambda e: e.resume_memory(tags=[tag], deadline_s=engines.request_s),
        )
        self._away.discard(tag)
