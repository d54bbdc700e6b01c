"""Which engine continues which conversation, and what its answer has to fulfil.

Invariants:

* turns of one conversation go to one engine (its prefix cache holds the context); a new
  conversation goes to the engine with the fewest requests in flight;
* a request that an engine fails is tried once on every other engine; then the error stands;
* tokens of a policy version that the step did not ask for are never handed on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from megatron_matpo.agents.sampling import Sampled
from megatron_matpo.errors import EngineError, EngineRejected
from megatron_matpo.obs.spans import note
from megatron_matpo.types import PolicyVersion

_log = logging.getLogger(__name__)

# After a failure an engine gets new conversations only if no other engine is left.
_SUSPECT_S = 10.0
_FINISHED = ("stop", "length")

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
    suspect_until: float = 0.0


class Router(Generic[Params]):
    """All engines of a run; hands out one `StepSampler` per collected step."""

    def __init__(
        self,
        engines: Sequence[Engine[Params]],
        params_for: Callable[[int], Params],
        max_staleness: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`params_for(max_tokens)` makes the sampling parameters of one request."""
        self._states = [_State(engine) for engine in engines]
        self._params_for = params_for
        self._max_staleness = max_staleness
        self._clock = clock

    def sampler(self, version: PolicyVersion) -> StepSampler[Params]:
        """The policy at `version`, for the episodes of one step."""
        return StepSampler(self, version)

    def pick(self, tried: Sequence[int]) -> int:
        """Index of the engine for a new conversation; engines in `tried` are left out."""
        now = self._clock()
        left = [index for index in range(len(self._states)) if index not in tried]
        return min(
            left,
            key=lambda index: (
                self._states[index].suspect_until > now,
                self._states[index].num_in_flight,
            ),
        )

    def is_suspect(self, index: int) -> bool:
        """The engine failed a moment ago."""
        return self._states[index].suspect_until > self._clock()

    @property
    def num_engines(self) -> int:
        """Number of engines."""
        return len(self._states)

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
            sampled = await state.engine.generate(ids, self._params_for(max_tokens))
            self._check(state.engine.url, sampled, version)
        except EngineError:
            state.suspect_until = self._clock() + _SUSPECT_S
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
        """As `Sampler.sample`; tries every engine at most once."""
        tried: list[int] = []
        while True:
            index = self._engine_of.get(conversation_id)
            if index is None or index in tried or self._router.is_suspect(index):
                index = self._router.pick(tried)
                self._engine_of[conversation_id] = index
            try:
                note(engine=index, engines_tried=len(tried) + 1)
                return await self._router.generate(index, ids, max_tokens, self._version)
            except EngineError as error:
                tried.append(index)
                if len(tried) == self._router.num_engines:
                    raise
                _log.warning("%s; trying another engine", error)
