"""The fleet as our router sees it when SGLang's router stands between: one engine, its URL.

Invariants:

* the router's workers are the fleet's routable engines, and of those that were workers already the
  ones that get weights now (paused, they hold requests back): an engine that was started anew is
  no worker before the fleet calls it healthy, a dead one none as soon as it is found dead;
* a turn that failed is tried again once the workers are others, and only then: nobody can say
  which engine it failed on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron_matpo.errors import EngineError, RolloutError
from megatron_matpo.rollout.fleet import Fleet
from megatron_matpo.types import PolicyVersion

_log = logging.getLogger(__name__)

CHECK_EVERY_S = 5.0
"""Without any change the router is looked at this often: it may have ended."""

Workers = frozenset[tuple[int, int]]
"""(engine, its incarnation)"""
T = TypeVar("T")


class Control(Protocol):
    """What is asked of the router; see `process.RouterControl`."""

    async def workers(self) -> dict[str, tuple[str, bool]]:
        """(id, whether it gets requests) by URL."""
        ...

    async def set_workers(self, urls: Sequence[str]) -> None:
        """Have requests go to these engines and no others."""
        ...


class BehindRouter:
    """Speaks `routing.Availability`. `run` keeps the router's workers; one event loop."""

    def __init__(
        self, fleet: Fleet, urls: Sequence[str], control: Control, *, limit_s: float, log: Path
    ) -> None:
        """The router has no workers before `run`.

        Args:
            fleet: the engines; somebody else runs its probes.
            urls: of all its engines, in its order.
            control: the router.
            limit_s: `rollout.health.no_engine_timeout_s`; so long the router may lack a worker.
            log: of the router, for messages.
        """
        self._fleet = fleet
        self._urls = urls
        self._control = control
        self._limit_s = limit_s
        self._log = log
        self._workers: Workers = frozenset()
        self._num_changes = 0
        self._changed = asyncio.Event()

    # ---- for our router ----

    @property
    def present(self) -> PolicyVersion:
        """The newest version that an engine was verified to hold."""
        return self._fleet.present

    def incarnation(self, index: int) -> int:
        """How often the workers became others."""
        return self._num_changes

    async def wait_routable(self) -> list[int]:
        """The router, as soon as an engine is routable and it has a worker."""
        while True:
            await self._fleet.wait_routable()
            if self._workers:
                return [0]
            await self._changed.wait()

    async def settled(self, indices: Sequence[int]) -> None:
        """Return when every worker has answered a probe, and the router has no others."""
        self._fleet.probe_now()
        await self._fleet.settled(self._fleet.routable())
        while self._workers != self._wanted() or self._refitting():
            await self._changed.wait()

    async def guarded(self, index: int, request: Coroutine[Any, Any, T]) -> T:
        """Await the request: which engine has it is not known."""
        return await request

    def served(self, index: int) -> None:
        """Nothing: which engine answered is not known."""

    def failed(self, index: int, error: EngineError) -> None:
        """Some engine failed a request: all are probed."""
        self._fleet.probe_now()

    # ---- the workers ----

    async def run(self) -> None:
        """Keep the router's workers until cancelled.

        Raises:
            RolloutError: the router ended, or does not do as told.
        """
        while True:
            wanted = self._wanted()
            keeping = asyncio.ensure_future(self._keep(wanted))
            differing = asyncio.ensure_future(self._differs(wanted))
            try:
                await asyncio.wait((keeping, differing), return_when=asyncio.FIRST_COMPLETED)
                if keeping.done():
                    keeping.result()
            finally:
                keeping.cancel()
                differing.cancel()
                await asyncio.gather(keeping, differing, return_exceptions=True)

    def _refitting(self) -> Workers:
        """Workers that the trainer gives weights to, the same processes as when they were taken."""
        now = {(index, self._fleet.incarnation(index)) for index in self._fleet.refitting()}
        return self._workers & now

    def _wanted(self) -> Workers:
        routable = {(index, self._fleet.incarnation(index)) for index in self._fleet.routable()}
        return self._refitting() | routable

    async def _differs(self, wanted: Workers) -> None:
        """Return when other workers are wanted."""
        while self._wanted() == wanted:
            await self._fleet.changed()
            self._tell()

    async def _keep(self, wanted: Workers) -> None:
        """Have the router send to `wanted`, again and again; never returns."""
        end = time.monotonic() + self._limit_s
        while True:
            try:
                await self._control.set_workers(self._urls_of(wanted))
            except EngineError as error:
                # An engine that just died is not taken; the fleet finds that out in its own time.
                await self._fall_back(wanted)
                if time.monotonic() > end:
                    raise RolloutError(
                        f"SGLang's router does not take its engines since {self._limit_s:g} s "
                        f"(rollout.health.no_engine_timeout_s): {error}; see {self._log}"
                    ) from error
                _log.warning("SGLang's router: %s", error)
            else:
                self._reached(wanted)
                end = time.monotonic() + self._limit_s
            await asyncio.sleep(CHECK_EVERY_S)

    async def _fall_back(self, wanted: Workers) -> None:
        """Go on with those that the router has taken; the others are offered to it anew later."""
        try:
            present = await self._control.workers()
            taken = {url for url, (_, is_used) in present.items() if is_used}
            workers = frozenset(item for item in wanted if self._urls[item[0]] in taken)
            await self._control.set_workers(self._urls_of(workers))
            self._reached(workers)
        except EngineError as error:
            raise RolloutError(
                f"rollout.router=sglang: SGLang's router does not answer: {error}; see {self._log}"
            ) from error

    def _urls_of(self, workers: Workers) -> list[str]:
        return sorted(self._urls[index] for index, _ in workers)

    def _reached(self, workers: Workers) -> None:
        if workers == self._workers:
            self._tell()
            return
        names = ", ".join(f"engine-{index}" for index, _ in sorted(workers))
        _log.info("SGLang's router sends to %s", names or "no engine")
        self._workers = workers
        self._num_changes += 1
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
