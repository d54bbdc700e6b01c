"""The fleet as trainer rank 0 sees it: the manager is asked, and told, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from megatron_matpo.rollout.client import EngineState, ManagerClient
from megatron_matpo.rollout.health import REFITTABLE, State
from megatron_matpo.types import PolicyVersion
from megatron_matpo.weight_sync.membership import Member, Which

_STATES = {
    Which.ALL: frozenset(State),
    Which.LIVING: frozenset(REFITTABLE),
    # What a refit is under way for, too: it may be its second attempt.
    Which.WAITING: frozenset({State.STALE, State.REFITTING}),
}


class ManagerMembership:
    """Speaks `weight_sync.membership.Membership`."""

    def __init__(self, client: ManagerClient) -> None:
        """`client` is of the run's manager."""
        self._client = client

    async def members(self, which: Which) -> list[Member]:
        """As the manager knows them now.

        Raises:
            RolloutError: the manager cannot be asked.
        """
        engines = await self._fleet()
        return [
            Member(engine.index, engine.incarnation)
            for engine in engines
            if engine.state in _STATES[which]
        ]

    async def refit_began(self, indices: Sequence[int]) -> None:
        """They are unroutable from now on."""
        await self._tell("refitting", engines=list(indices))

    async def refitted(self, version: PolicyVersion, indices: Sequence[int]) -> None:
        """They are routable from now on, and the others are not, if that version is new."""
        await self._tell("refitted", version=version, engines=list(indices))

    async def lost(self, reasons: Mapping[int, str]) -> None:
        """The manager asks the supervisor to start them anew."""
        await self._tell("lost", engines={str(index): why for index, why in reasons.items()})

    async def describe(self) -> str:
        """Every engine with its state."""
        return "; ".join(
            f"engine-{engine.index} is {engine.state}: {engine.reason}"
            for engine in await self._fleet()
        )

    async def _fleet(self) -> list[EngineState]:
        return await asyncio.to_thread(self._client.fleet)

    async def _tell(self, word: str, **said: object) -> None:
        await asyncio.to_thread(self._client.tell_fleet, word, said)
