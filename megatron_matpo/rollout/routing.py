"""Which engine continues which conversation, and what its answer has to fulfil.

Invariants:

* turns of one conversation go to one engine (its prefix cache holds the context); a new
  conversation goes to the engine with the fewest requests in flight;
* only engines that the fleet calls routable get requests; without one they wait for it;
* a request that an engine fails is tried once on every other one, and again on one that was
  started anew; then the error stands;
* tokens of a policy version that the step did not ask for are never handed on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from megatron_matpo.agents.sampling import Sampled
from megatron_matpo.errors import EngineError, EngineRejected
from megatron_matpo.obs.spans import note
from megatron_matpo.rollout.fleet import Fleet
from megatron_matpo.types import PolicyVersion

_log = logging.getLogger(__name__)

_FINISHED = ("stop", "length")

Tried = set[tuple[int, int]]
"""(engine, its incarnation) of the requests that failed."""
Params = TypeVar("Params", contravariant=True)


class Engine(Protocol[Params]):
    """One rollout server."""

    @property
    def url(self) -> str:
        """Its address, for messages."""
        ...

    async def generate(self, input_ids: Sequence[int], params: Params) -> Sampled:
        """Continue `input_ids`.

        Raises:
            EngineError: it could not.
        """
        ...


@dataclass(slots=True)
class _State(Generic[Params]):
    """What the router knows of one engine."""

    engine: Engine[Params]
    num_in_flight: int = 0


class Router(Generic[Params]):
    """All engines of a run; hands out one `StepSampler` per collected step."""

    def __init__(
        self,
        engines: Sequence[Engine[Params]],
        params_for: Callable[[int], Params],
        max_staleness: int = 0,
        *,
        fleet: Fleet,
    ) -> None:
        """`params_for(max_tokens)` makes the sampling parameters of one request.

        `fleet` knows which of `engines` may be asked.
        """
        self._fleet = fleet
        self._states = [_State(engine) for engine in engines]
        self._params_for = params_for
        self._max_staleness = max_staleness

    def sampler(self, version: PolicyVersion) -> StepSampler[Params]:
        """The policy at `version`, for the episodes of one step."""
        return StepSampler(self, version)

    async def engine_for(self, wanted: int | None, tried: Tried, last: EngineError | None) -> int:
        """The engine of the next request: `wanted` if it may be asked, else the least loaded.

        Raises:
            EngineError: `last`; every engine was `tried`, and those that failed are not dead.
        """
        has_settled = False
        while True:
            routable = await self._fleet.wait_routable()
            left = [i for i in routable if (i, self._fleet.incarnation(i)) not in tried]
            if wanted in left:
                return wanted
            if left:
                return min(left, key=lambda index: self._states[index].num_in_flight)
            if last is None or has_settled:
                assert last is not None, "nothing was tried"
                raise last
            await self._fleet.settled(routable)
            has_settled = True

    def start_of(self, index: int) -> tuple[int, int]:
        """The engine's present start, for `Tried`."""
        return index, self._fleet.incarnation(index)

    async def generate(
        self, index: int, ids: Sequence[int], max_tokens: int, version: PolicyVersion
    ) -> Sampled:
        """One request to one engine, its answer checked.

        Raises:
            EngineError: the engine failed, aborted, or sampled with another policy version.
        """
        state = self._states[index]
        state.num_in_flight += 1
        try:
            request = state.engine.generate(ids, self._params_for(max_tokens))
            sampled = await self._fleet.guarded(index, request)
            self._check(state.engine.url, sampled, version)
            self._fleet.served(index)
        except EngineError as error:
            self._fleet.failed(index, error)
            raise
        finally:
            state.num_in_flight -= 1
        return sampled

    def _check(self, url: str, sampled: Sampled, version: PolicyVersion) -> None:
        if sampled.finish_reason not in _FINISHED:
            raise EngineRejected(
                f"{url}: the generation ended with {sampled.finish_reason!r} instead of "
                f"{' or '.join(_FINISHED)}"
            )
        num_tokens = len(sampled.token_ids)
        num_covered = sum(span.num_tokens for span in sampled.versions)
        if len(sampled.logprobs) != num_tokens or num_covered != num_tokens:
            raise EngineRejected(
                f"{url}: returned {num_tokens} tokens, but {len(sampled.logprobs)} log-probs and "
                f"policy versions of {num_covered} tokens"
            )
        oldest = version - self._max_staleness
        wrong = sorted(
            {span.version for span in sampled.versions if not oldest <= span.version <= version}
        )
        if wrong:
            served = ", ".join(map(str, wrong))
            allowed = f"{version}" if oldest == version else f"{oldest} to {version}"
            raise EngineRejected(
                f"{url}: sampled with policy version {served}, but the step asks for {allowed}: "
                "the engine missed a weight push, or got one while it was sampling"
            )


class StepSampler(Generic[Params]):
    """Speaks `agents.sampling.Sampler`; lives for one step."""

    def __init__(self, router: Router[Params], version: PolicyVersion) -> None:
        """Use `Router.sampler`."""
        self._router = router
        self._version = version
        self._engine_of: dict[str, int] = {}

    async def sample(self, ids: Sequence[int], max_tokens: int, conversation_id: str) -> Sampled:
        """As `Sampler.sample`; tries every start of an engine at most once."""
        tried: Tried = set()
        last: EngineError | None = None
        while True:
            wanted = self._engine_of.get(conversation_id)
            index = await self._router.engine_for(wanted, tried, last)
            self._engine_of[conversation_id] = index
            tried.add(self._router.start_of(index))
            try:
                note(engine=index, engines_tried=len(tried))
                return await self._router.generate(index, ids, max_tokens, self._version)
            except EngineError as error:
                last = error
                _log.warning("%s; trying another engine", error)
