"""Which engine continues which conversation, and what its answer has to fulfil.

Invariants:

* turns of one conversation go to one engine (its prefix cache holds the context); a new
  conversation goes to the engine with the fewest requests in flight;
* only engines that the fleet calls routable get requests; without one they wait for it;
* a request that an engine fails is tried once on every other one, and again on one that was
  started anew; then the error stands;
* a turn that an engine ends early (paused for new weights, or failed) goes on from its tokens, on
  the same engine if it only paused;
* tokens of a policy version that was not asked for are never handed on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from megatron_matpo.agents.sampling import Sampled
from megatron_matpo.errors import EngineError, EngineRejected
from megatron_matpo.obs.spans import note
from megatron_matpo.rollout.continuation import Continuation
from megatron_matpo.rollout.generation import ABORT, BrokenGeneration, Generation
from megatron_matpo.types import PolicyVersion

_log = logging.getLogger(__name__)

_FINISHED = ("stop", "length", ABORT)
# A paused engine holds requests back instead of ending them again and again; one that ends this
# many in a row without a token is broken.
_MAX_EMPTY = 8
# Before a turn that was ended is sent again: the engine that ended it is about to pause.
_RESEND_S = 0.25

Starts = set[tuple[int, int]]
"""(engine, its incarnation)"""
Params = TypeVar("Params", contravariant=True)
T = TypeVar("T")


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


class Availability(Protocol):
    """What the router has to know of its engines; `fleet.Fleet` says what each method means."""

    @property
    def present(self) -> PolicyVersion:
        """The newest version that an engine was verified to hold."""
        ...

    def incarnation(self, index: int) -> int:
        """Another number than before: a request that failed may be tried there again."""
        ...

    async def wait_routable(self) -> list[int]:
        """Engines that get requests, as soon as there is one."""
        ...

    async def settled(self, indices: Sequence[int]) -> None:
        """Return when it is known whether these engines, on which a request failed, live."""
        ...

    async def guarded(self, index: int, request: Coroutine[Any, Any, T]) -> T:
        """Await a request to an engine, but not for longer than the engine is known to live."""
        ...

    def served(self, index: int) -> None:
        """A request was answered."""
        ...

    def failed(self, index: int, error: EngineError) -> None:
        """A request failed."""
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
        stop_token_ids: Sequence[int] = (),
        *,
        fleet: Availability,
    ) -> None:
        """`params_for(max_tokens)` makes the sampling parameters of one request.

        `stop_token_ids` are all that end a turn, those of the model included. `fleet` knows which
        of the `engines` may be asked.
        """
        self._fleet = fleet
        self._states = [_State(engine) for engine in engines]
        self._params_for = params_for
        self.stop_token_ids = stop_token_ids
        self._expected: PolicyVersion = 0
        self.num_continued = 0
        """Turns that were sampled in more than one piece."""

    def sampler(self, version: PolicyVersion) -> StepSampler[Params]:
        """The policy at `version` and no other, for the episodes of one step."""
        self.expect(version)
        return StepSampler(self, version)

    def expect(self, version: PolicyVersion) -> None:
        """From now on an engine may serve up to `version`."""
        self._expected = max(self._expected, version)

    def follower(self) -> StepSampler[Params]:
        """The policy as it is when it samples, for the episodes of one group.

        Its turns may hold tokens of several versions; who takes them looks at their age.
        """
        return StepSampler(self, None)

    @property
    def newest(self) -> PolicyVersion:
        """The newest version that any engine may serve (see `follower`)."""
        return max(self._expected, self._fleet.present)

    async def engine_for(
        self, wanted: int | None, failed: Starts, last: EngineError | None
    ) -> tuple[int, int]:
        """The engine of the next request: `wanted` if it may be asked, else the least loaded.

        Returns:
            Its index, and which start of it.

        Raises:
            EngineError: `last`; every engine is among `failed`, and none of them is dead.
        """
        has_settled = False
        while True:
            routable = await self._fleet.wait_routable()
            starts = [(index, self._fleet.incarnation(index)) for index in routable]
            left = [start for start in starts if start not in failed]
            if left:
                load = {index: state.num_in_flight for index, state in enumerate(self._states)}
                return min(left, key=lambda start: (start[0] != wanted, load[start[0]]))
            assert last is not None, "none has failed, and none is left"
            if has_settled:
                raise last
            await self._fleet.settled(routable)
            has_settled = True

    async def generate(
        self, index: int, ids: Sequence[int], max_tokens: int, version: PolicyVersion | None
    ) -> Sampled:
        """One request to one engine, its answer checked.

        Raises:
            EngineError: the engine failed, or sampled with another policy version.
        """
        state = self._states[index]
        state.num_in_flight += 1
        try:
            request = state.engine.generate(ids, self._params_for(max_tokens))
            sampled = await self._fleet.guarded(index, request)
            self._check(state.engine.url, sampled, version)
            self._fleet.served(index)
        except BrokenGeneration as error:
            self._fleet.failed(index, error)
            self._check(state.engine.url, error.sampled, version)
            raise
        except EngineError as error:
            self._fleet.failed(index, error)
            raise
        finally:
            state.num_in_flight -= 1
        return sampled

    def _check(self, url: str, sampled: Sampled, version: PolicyVersion | None) -> None:
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
        oldest, newest = (0, self.newest) if version is None else (version, version)
        wrong = sorted(
            {span.version for span in sampled.versions if not oldest <= span.version <= newest}
        )
        if wrong:
            served = ", ".join(map(str, wrong))
            allowed = f"{version}" if oldest == newest else f"{oldest} to {newest}"
            raise EngineRejected(
                f"{url}: sampled with policy version {served}, but the step asks for {allowed}: "
                "the engine missed a weight push, or got one while it was sampling"
            )


class StepSampler(Generic[Params]):
    """Speaks `agents.sampling.Sampler`; lives for one step, or for one group."""

    def __init__(self, router: Router[Params], version: PolicyVersion | None) -> None:
        """Use `Router.sampler` or `Router.follower`."""
        self._router = router
        self._version = version
        self._engine_of: dict[str, int] = {}

    async def sample(self, ids: Sequence[int], max_tokens: int, conversation_id: str) -> Generation:
        """As `Sampler.sample`; after a failure tries every other start of an engine once."""
        turn = Continuation(max_tokens, self._router.stop_token_ids)
        failed: Starts = set()
        last: EngineError | None = None
        num_empty = 0
        while True:
            wanted = self._engine_of.get(conversation_id)
            start = await self._router.engine_for(wanted, failed, last)
            index = self._engine_of[conversation_id] = start[0]
            note(engine=index, engines_tried=len(failed) + 1)
            try:
                piece = await self._router.generate(
                    index, turn.context(ids), turn.num_left, self._version
                )
                ended = turn.add(piece)
                num_empty = 0 if piece.token_ids else num_empty + 1
                if num_empty > _MAX_EMPTY:
                    raise EngineRejected(f"engine {index} ended {num_empty} requests at once")
                if ended == ABORT:
                    await asyncio.sleep(_RESEND_S)
            except EngineError as error:
                ended = turn.add(error.sampled) if isinstance(error, BrokenGeneration) else ABORT
                failed.add(start)
                last, num_empty = error, 0
                _log.warning("%s; going on with another engine", error)
            if ended != ABORT:
                self._router.num_continued += turn.num_pieces > 1
                note(pieces=turn.num_pieces)
                return turn.result(ended)
