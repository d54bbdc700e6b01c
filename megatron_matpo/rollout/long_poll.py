"""Collections in progress, so that an answer can be interrupted by a wish for weights.

Invariants:

* a collection whose answer was "an engine waits for weights" goes on, and the next request with the
  same words is attached to it;
* one whose client goes away is cancelled, and so is one that nobody asked for again when another
  begins;
* a collection does not outlive the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from megatron_matpo.errors import RolloutError
from megatron_matpo.types import RolloutBatch


class EngineWaits(Protocol):
    """What can be said of the engines while episodes run."""

    async def refit_wanted(self) -> list[int]:
        """Return the engines that wait for weights, once there is one."""
        ...

    async def hopeless(self) -> RolloutError:
        """Return why nothing can be sampled, once that is certain."""
        ...


class Collections:
    """By the words of the request."""

    def __init__(self, engines: EngineWaits) -> None:
        """`engines` can interrupt an answer."""
        self._engines = engines
        self._running: dict[str, asyncio.Task[RolloutBatch]] = {}
        self._waiters: dict[str, int] = {}

    async def answer(
        self, key: str, collect: Callable[[], Coroutine[Any, Any, RolloutBatch]]
    ) -> RolloutBatch | list[int]:
        """The batch, or the engines that wait for weights.

        Raises:
            RolloutError: no engine serves the present weights for too long.
            Exception: whatever `collect` raised.
        """
        await self._drop([other for other in self._running if not self._waiters.get(other)], key)
        if key not in self._running:
            self._running[key] = asyncio.ensure_future(collect())
        task = self._running[key]
        refit = asyncio.ensure_future(self._engines.refit_wanted())
        hopeless = asyncio.ensure_future(self._engines.hopeless())
        self._waiters[key] = self._waiters.get(key, 0) + 1
        is_kept = False
        try:
            await asyncio.wait((task, refit, hopeless), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if hopeless.done():
                raise hopeless.result()
            is_kept = True
            return refit.result()
        finally:
            self._waiters[key] -= 1
            for other in (refit, hopeless):
                other.cancel()
            if not is_kept and not self._waiters[key]:
                await self._drop([key])

    async def close(self) -> None:
        """Cancel everything."""
        await self._drop(list(self._running))

    async def _drop(self, keys: list[str], but: str = "") -> None:
        tasks = [self._running.pop(key) for key in keys if key != but]
        for key in keys:
            if key != but:
                self._waiters.pop(key, None)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
