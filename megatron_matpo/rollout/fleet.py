"""All engines of a run as the manager sees them: who is asked, who is waited for, who is missing.

Keeps the `Health` of each engine, probes it in the background, and hears from the router how
requests went and from the trainer what was pushed. Used from one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from megatron_matpo.config.rollout import HealthConfig
from megatron_matpo.errors import EngineError, EngineRejected, EngineUnreachable, RolloutError
from megatron_matpo.rollout.health import ROUTABLE, Event, Health, State
from megatron_matpo.types import PolicyVersion

_log = logging.getLogger(__name__)

RETRY_S = 1.0
"""After a probe that was not answered the next one comes this soon."""
OWN_WEIGHTS: PolicyVersion = 0
"""Version of what an engine loaded itself, where no trainer pushes (`matpo eval`)."""

# A request whose connection is closed ends at once.
_CLOSED_S = 1.0

T = TypeVar("T")


class Probed(Protocol):
    """What the fleet needs of an engine client."""

    @property
    def url(self) -> str:
        """Its address, for messages."""
        ...

    async def health_generate(self, *, deadline_s: float) -> None:
        """Return if the engine generates, or is busy generating."""
        ...

    async def weight_version(self, *, deadline_s: float) -> str:
        """The version that the engine says it serves."""
        ...

    async def close(self) -> None:
        """Close all connections; the next request opens new ones."""
        ...


@dataclass(slots=True)
class _Member:
    """One engine."""

    url: str
    client: Probed | None
    health: Health = field(default_factory=Health)
    reason: str = "not heard of yet"
    """What brought it into its state."""
    epoch: int = 0
    """Grows with what the trainer does to it: a probe that began before says nothing any more."""
    num_answers: int = 0
    served_as: int = -1
    """The incarnation that was healthy last: its ordinary pushes are not worth a line."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    dead: asyncio.Event = field(default_factory=asyncio.Event)


class Fleet:
    """`run` probes; everything else may be called meanwhile."""

    def __init__(
        self,
        clients: Sequence[Probed],
        config: HealthConfig,
        *,
        has_trainer: bool,
        ask_restart: Callable[[int, str], None] = lambda index, why: None,
    ) -> None:
        """Nothing is asked before `run`.

        Args:
            clients: one for each engine of the plan, in its order.
            config: when an engine is what.
            has_trainer: without one engines serve what they loaded themselves, as `OWN_WEIGHTS`.
            ask_restart: called with the index of an engine that died, and why.
        """
        self._members = [_Member(client.url, client) for client in clients]
        self._config = config
        self._has_trainer = has_trainer
        self._ask_restart = ask_restart
        self._changed = asyncio.Event()
        self._is_probing = False

    @classmethod
    def unwatched(cls, urls: Sequence[str], config: HealthConfig | None = None) -> Fleet:
        """Engines that nobody probes and that serve `OWN_WEIGHTS`, for benchmarks and tests."""
        fleet = cls([], config or HealthConfig(), has_trainer=True)
        fleet._members = [_Member(url, None) for url in urls]
        everyone = range(len(urls))
        fleet.refit_began(everyone)
        fleet.refitted(OWN_WEIGHTS, everyone)
        return fleet

    @property
    def present(self) -> PolicyVersion:
        """The newest version that an engine was verified to hold; 0 before the first push."""
        return max((member.health.present or 0 for member in self._members), default=0)

    # ---- for the router ----

    def routable(self) -> list[int]:
        """Engines that get requests now: the healthy ones, else the suspect ones."""
        for state in ROUTABLE:
            found = [i for i, member in enumerate(self._members) if member.health.state is state]
            if found:
                return found
        return []

    def refitting(self) -> list[int]:
        """Engines that the trainer gives weights to now."""
        states = enumerate(member.health.state for member in self._members)
        return [index for index, state in states if state is State.REFITTING]

    def incarnation(self, index: int) -> int:
        """Another number than before: the engine was started anew, or lost what it held."""
        return self._members[index].health.incarnation

    async def wait_routable(self) -> list[int]:
        """`routable`, as soon as there is one; how long that may take is `hopeless`'s affair."""
        while not (found := self.routable()):
            await self.changed()
        return found

    async def settled(self, indices: Sequence[int]) -> None:
        """Return when each of these engines has answered a probe, or is not routable any more.

        Whoever failed on all of them knows then whether they are to blame. Without probes at once.
        """
        before = {index: self._members[index].num_answers for index in indices}
        while self._is_probing and any(
            self._members[index].num_answers == count
            and self._members[index].health.state in ROUTABLE
            for index, count in before.items()
        ):
            await self.changed()

    async def guarded(self, index: int, request: Coroutine[Any, Any, T]) -> T:
        """Await a request to an engine, but not for longer than the engine lives.

        When it is found dead its connections are closed, so that a request ends with what it has.

        Raises:
            EngineUnreachable: the engine was found dead, and the request did not end with that.
            Exception: whatever the request raised.
        """
        member = self._members[index]
        task = asyncio.ensure_future(request)
        dead = asyncio.ensure_future(member.dead.wait())
        try:
            await asyncio.wait((task, dead), return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and member.client is not None:
                await member.client.close()
                await asyncio.wait((task,), timeout=_CLOSED_S)
            if task.done():
                return task.result()
            raise EngineUnreachable(f"{member.url}: found dead ({member.reason})")
        finally:
            task.cancel()
            dead.cancel()
            await asyncio.gather(task, dead, return_exceptions=True)

    def served(self, index: int) -> None:
        """A request was answered."""
        if self._members[index].health.failed_requests or index not in self.routable():
            self._apply(index, Event.SERVED, "a request was served")

    def failed(self, index: int, error: EngineError) -> None:
        """A request failed; the engine is probed at once."""
        self._apply(index, Event.FAILED, str(error))
        self._members[index].wake.set()

    def probe_now(self) -> None:
        """A request failed of which nobody knows the engine: all of them are probed at once."""
        for member in self._members:
            member.wake.set()

    async def changed(self) -> None:
        """Return at the next event of any engine."""
        await self._changed.wait()

    # ---- for the trainer, through the server ----

    def snapshot(self) -> dict[str, Any]:
        """All engines, as `GET /fleet` tells them."""
        return {
            "version": self.present,
            "engines": [
                {
                    "index": index,
                    "url": member.url,
                    "state": str(member.health.state),
                    "version": member.health.version,
                    "incarnation": member.health.incarnation,
                    "reason": member.reason,
                }
                for index, member in enumerate(self._members)
            ],
        }

    def refit_began(self, indices: Sequence[int]) -> None:
        """The trainer is about to pause these engines and to give them weights."""
        for index in indices:
            self._members[index].epoch += 1
            self._apply(index, Event.REFIT_BEGAN, "gets weights")

    def refitted(self, version: PolicyVersion, indices: Sequence[int]) -> None:
        """These engines hold `version`, verified; the others do not."""
        for index, member in enumerate(self._members):
            if index in indices:
                member.epoch += 1
                self._apply(index, Event.REFITTED, f"took version {version}", version)
            else:
                self._apply(index, Event.PUSHED, f"lacks version {version}", version)

    def lost(self, reasons: Mapping[int, str]) -> None:
        """These engines did not do what a push asked of them."""
        for index, reason in reasons.items():
            self._members[index].epoch += 1
            self._apply(index, Event.LOST, reason)

    # ---- for a collection that runs ----

    async def refit_wanted(self) -> list[int]:
        """Engines that wait for weights, as soon as there is one."""
        while not (found := self._stale()):
            await self.changed()
        return found

    async def hopeless(self) -> RolloutError:
        """Return why nothing can be sampled, once no engine was routable for too long."""
        limit_s = self._config.no_engine_timeout_s
        while True:
            await self._until(lambda: not self.routable())
            with suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._until(lambda: bool(self.routable()))
                continue
            return RolloutError(
                f"no engine serves the present weights since {limit_s:g} s "
                f"(rollout.health.no_engine_timeout_s): {self.describe()}"
            )

    def describe(self) -> str:
        """Every engine with its state, for messages."""
        return "; ".join(
            f"engine-{index} ({member.url}) is {member.health.state}: {member.reason}"
            for index, member in enumerate(self._members)
        )

    # ---- probes ----

    async def run(self) -> None:
        """Probe every engine until cancelled."""
        self._is_probing = True
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(self._members)):
                    group.create_task(self._watch(index))
        finally:
            self._is_probing = False

    async def _watch(self, index: int) -> None:
        member = self._members[index]
        while True:
            member.wake.clear()
            event = Event.ANSWERED
            # While the trainer has it, it is paused and cannot generate.
            if member.health.state is not State.REFITTING:
                epoch = member.epoch
                event, reason = await self._probe(member)
                if epoch == member.epoch:
                    self._apply(index, event, reason)
            if event is Event.SILENT:
                # However many requests fail meanwhile: it may be over in a moment.
                await asyncio.sleep(RETRY_S)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config.probe_every_s):
                    await member.wake.wait()

    async def _probe(self, member: _Member) -> tuple[Event, str]:
        assert member.client is not None, "it is watched"
        limit_s = self._config.probe_timeout_s
        try:
            await member.client.health_generate(deadline_s=limit_s)
            held = await member.client.weight_version(deadline_s=limit_s)
        except EngineRejected as error:
            is_dead = member.health.state is State.DEAD
            return Event.BOOTING if is_dead else Event.SILENT, str(error)
        except EngineError as error:
            return Event.SILENT, str(error)
        known = member.health.version
        if known is not None and held != str(known):
            return Event.RESTARTED, f"holds version {held!r} instead of {known}"
        return Event.ANSWERED, "answers"

    def _apply(
        self, index: int, event: Event, reason: str, version: PolicyVersion | None = None
    ) -> None:
        member = self._members[index]
        before = member.health
        member.health = before.after(event, self._config, version)
        member.num_answers += event in (Event.ANSWERED, Event.RESTARTED)
        state = member.health.state
        if state is not before.state:
            member.reason = reason
            is_push = event in (Event.REFIT_BEGAN, Event.REFITTED)
            is_ordinary = is_push and member.served_as == member.health.incarnation
            level = logging.DEBUG if is_ordinary else logging.INFO
            _log.log(level, "engine-%d: %s -> %s: %s", index, before.state, state, reason)
            if state is State.DEAD:
                member.dead.set()
                self._ask_restart(index, reason)
            elif state in ROUTABLE:
                member.dead.clear()
                member.served_as = member.health.incarnation
        if state is State.STALE and not self._has_trainer:
            self.refit_began([index])
            self._apply(index, Event.REFITTED, "loaded its weights itself", OWN_WEIGHTS)
        self._changed.set()
        self._changed = asyncio.Event()

    def _stale(self) -> list[int]:
        return [i for i, member in enumerate(self._members) if member.health.state is State.STALE]

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.changed()
