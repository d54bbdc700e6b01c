"""The engines of a run as weight sync sees them, and how several waits end together.

Every wait on them has the deadline `weight_sync.timeout_s`, and its error names who is late.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar, cast

from megatron_matpo.errors import EngineError, EngineRejected, WeightSyncError
from megatron_matpo.types import PauseMode

T = TypeVar("T")
BLAME_S = 2.0
"""After a first failure the others get so long to fail too: an engine that dies in a collective
breaks it for its neighbours, whose errors may come first."""
SLACK_S = 5.0
"""A guard behind a deadline is so much later."""


class EngineControl(Protocol):
    """What weight sync needs of an engine client."""

    @property
    def url(self) -> str:
        """Names the engine in errors."""
        ...

    async def wait_ready(self, *, deadline_s: float) -> None:
        """Return when the engine generates."""
        ...

    async def pause(self, *, mode: PauseMode, deadline_s: float) -> None:
        """Stop sampling; new requests wait. `abort` ends what is being sampled."""
        ...

    async def resume(self, *, deadline_s: float) -> None:
        """Sample again."""
        ...

    async def wait_idle(self, *, deadline_s: float) -> None:
        """Return when the engine has nothing to do; it forgets cached prefixes then."""
        ...

    async def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
        deadline_s: float,
    ) -> None:
        """Make the engine join the group."""
        ...

    async def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        weight_version: str | None,
        load_format: str | None,
        flush_cache: bool,
        deadline_s: float,
    ) -> None:
        """Make the engine receive one bucket."""
        ...

    async def update_weights_from_disk(
        self, *, folder: str, weight_version: str, flush_cache: bool, deadline_s: float
    ) -> None:
        """Make the engine load a folder."""
        ...

    async def update_weights_from_tensor(
        self,
        *,
        payloads: Sequence[bytes],
        weight_version: str | None,
        flush_cache: bool,
        deadline_s: float,
    ) -> None:
        """Make the engine load one bucket out of memory that it opens."""
        ...

    async def release_memory(self, *, tags: Sequence[str], deadline_s: float) -> None:
        """Make the engine, paused, give memory back to its device."""
        ...

    async def resume_memory(self, *, tags: Sequence[str], deadline_s: float) -> None:
        """Make it take that again, empty."""
        ...

    async def flush_cache(self, *, deadline_s: float) -> None:
        """Forget cached prefixes; the scheduler itself answers, be it with a refusal."""
        ...

    async def weight_version(self, *, deadline_s: float) -> str:
        """The version that the engine says it serves."""
        ...

    async def weight_checksums(self, *, deadline_s: float) -> list[dict[str, str]]:
        """Per tensor-parallel rank of the engine, checksums by parameter."""
        ...

    async def close(self) -> None:
        """Release the client's connections."""
        ...


class Engines:
    """Engines of a run, asked together."""

    def __init__(
        self,
        clients: Sequence[EngineControl],
        timeout_s: float,
        indices: Sequence[int] | None = None,
    ) -> None:
        """Keep the clients; `timeout_s` is `weight_sync.timeout_s`.

        `indices` are their places in the plan; None: they are all engines.
        """
        self.indices = list(range(len(clients))) if indices is None else list(indices)
        assert len(self.indices) == len(clients)
        assert len({engine.url for engine in clients}) == len(clients), "errors name the URL"
        self.clients = clients
        self.timeout_s = timeout_s
        # A client's own deadline is only a guard: ours, which names the setting, comes first.
        self.request_s = timeout_s + SLACK_S

    async def all(
        self, what: str, ask: Callable[[EngineControl], Awaitable[T]]
    ) -> dict[EngineControl, T]:
        """Ask every engine.

        Raises:
            WeightSyncError: one failed, or did not answer in time; names `what` and the engine.
        """
        waits = {engine.url: ask(engine) for engine in self.clients}
        answers = await self.together(what, waits)
        return dict(zip(self.clients, answers, strict=True))

    async def together(
        self,
        what: str,
        waits: Mapping[str, Awaitable[T]],
        watched: Iterable[tuple[str, asyncio.Future[T]]] = (),
    ) -> list[T]:
        """Wait for all of `waits`, named by who is waited for; ends early if a `watched` one fails.

        Raises:
            WeightSyncError: one failed, or was not done in time.
        """
        started = time.monotonic()
        must: dict[asyncio.Future[T], str] = {
            asyncio.ensure_future(wait): who for who, wait in waits.items()
        }
        names = must | {future: who for who, future in watched}
        try:
            while not _has_failed(names) and any(not task.done() for task in must):
                left_s = self.timeout_s - (time.monotonic() - started)
                open_ones = [task for task in names if not task.done()]
                done, _ = await asyncio.wait(
                    open_ones, timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
            if _has_failed(names):
                await asyncio.wait(names, timeout=min(BLAME_S, self.timeout_s))
            return _results(what, must, names, self.timeout_s)
        except BaseException:
            for task in names:
                task.cancel()
            # Their errors are in ours; an exception that nobody took would be logged again.
            await asyncio.gather(*names, return_exceptions=True)
            raise

    async def silent(self, answer_timeout_s: float) -> dict[int, str]:
        """Engines (by their places in the plan) whose scheduler does not answer, and why.

        Whoever is stuck in a collective does not; an HTTP server alone is not enough.
        """
        return await self.unwilling(
            lambda engine: engine.flush_cache(deadline_s=answer_timeout_s + SLACK_S),
            answer_timeout_s,
            refusal_is_fine=True,
        )

    async def unwilling(
        self,
        ask: Callable[[EngineControl], Awaitable[None]],
        answer_timeout_s: float,
        *,
        refusal_is_fine: bool = False,
    ) -> dict[int, str]:
        """Engines, by their places in the plan, that do not do what is asked in time, and why."""

        async def one(engine: EngineControl) -> str:
            try:
                async with asyncio.timeout(answer_timeout_s):
                    await ask(engine)
            except EngineRejected as error:
                return "" if refusal_is_fine else str(error)
            except TimeoutError:
                return f"no answer inside weight_sync.answer_timeout_s={answer_timeout_s:g}"
            except EngineError as error:
                return str(error)
            return ""

        reasons = await asyncio.gather(*(one(engine) for engine in self.clients))
        return {i: reason for i, reason in zip(self.indices, reasons, strict=True) if reason}

    async def describe(self) -> str:
        """What every engine says of itself, for the error of a failed push; takes `BLAME_S`."""

        async def one(engine: EngineControl) -> str:
            try:
                return f"{engine.url} answers, version {await engine.weight_version(deadline_s=60)}"
            except EngineError as error:
                return f"{engine.url} does not answer ({error})"

        tasks = {asyncio.ensure_future(one(engine)): engine.url for engine in self.clients}
        done, late = await asyncio.wait(tasks, timeout=BLAME_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        texts = [task.result() for task in done]
        texts += [f"{tasks[task]} does not answer at all" for task in late]
        return "; ".join(sorted(texts))


def _has_failed(futures: Iterable[asyncio.Future[T]]) -> bool:
    return any(future.done() and future.exception() for future in futures)


def _results(
    what: str,
    must: Mapping[asyncio.Future[T], str],
    names: Mapping[asyncio.Future[T], str],
    timeout_s: float,
) -> list[T]:
    """Results of `must`, or the error that tells why not."""
    failed = [
        (who, cast(BaseException, task.exception()))
        for task, who in names.items()
        if task.done() and task.exception()
    ]
    for _, error in failed:
        if not isinstance(error, EngineError | RuntimeError | OSError):
            raise error
    if failed:
        text = "; ".join(f"{who}: {error}" for who, error in failed)
        raise WeightSyncError(f"{what}: {text}") from failed[0][1]
    if any(not task.done() for task in must):
        late = [who for task, who in names.items() if not task.done()]
        raise WeightSyncError(
            f"{what}: {', '.join(late)} not done after {timeout_s:g} s "
            f"(weight_sync.timeout_s={timeout_s:g})"
        )
    return [task.result() for task in must]
