"""Spans: what took how long, on which track. Costs almost nothing where nobody records.

`with span("turn") as turn:` measures, always (`turn.seconds`), and where a recording is on (it is
inherited by tasks, as a context variable is) also keeps the span. So a time that goes into the
metrics and the one in the trace are one measurement.

A span says what was done in names that we or the recipe chose, in numbers and in names of exception
classes. Never text of prompts, replies, arguments or errors: those may hold secrets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import NamedTuple, Protocol, Self

Value = str | int | float | bool
Track = tuple[str, str]
"""(unit, row): the planner of an episode is `(episode id, "")`, its workers have rows of their own;
a trainer rank is `("", "")`."""

RECEIVE = "receive"
"""Name of the spans in which an engine (note `engine`) takes weights."""


class Span(NamedTuple):
    """A finished span."""

    name: str
    track: Track
    start_s: float
    """On `time.monotonic`."""
    end_s: float
    notes: dict[str, Value]


class Sink(Protocol):
    """Where finished spans go."""

    def add(self, span: Span) -> None:
        """Keep one; called from where it was measured, so it must be quick."""
        ...


class _Scope(NamedTuple):
    """What a span that is opened now belongs to."""

    sink: Sink
    track: Track
    notes: dict[str, Value]
    """Of the innermost open span."""


_SCOPE: ContextVar[_Scope | None] = ContextVar("matpo_span_scope", default=None)


@contextmanager
def recording(sink: Sink, track: Track = ("", "")) -> Iterator[None]:
    """Keep the spans that the block, and tasks started in it, finish."""
    token = _SCOPE.set(_Scope(sink, track, {}))
    try:
        yield
    finally:
        _SCOPE.reset(token)


def record_from_now_on(sink: Sink) -> None:
    """As `recording`, for the rest of the process: call before any event loop is made."""
    _SCOPE.set(_Scope(sink, ("", ""), {}))


def note(**values: Value) -> None:
    """Add to what the innermost open span of this task says."""
    scope = _SCOPE.get()
    if scope is not None:
        scope.notes.update(values)


class span:
    """Measures a block. What it raises is noted by the name of its class."""

    __slots__ = ("_name", "_notes", "_outer", "_start_s", "_token", "_track", "seconds")

    def __init__(self, name: str, track: Track | None = None, **notes: Value) -> None:
        """`track` moves the span, and those inside it, to another one."""
        self._name, self._track, self._notes = name, track, notes
        self.seconds = 0.0
        """How long the block took; 0 while it runs."""

    def __enter__(self) -> Self:
        """Start the clock."""
        self._outer = outer = _SCOPE.get()
        if outer is not None:
            scope = _Scope(outer.sink, self._track or outer.track, self._notes)
            self._token = _SCOPE.set(scope)
        self._start_s = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop it."""
        end_s = time.monotonic()
        self.seconds = end_s - self._start_s
        outer = self._outer
        if outer is not None:
            _SCOPE.reset(self._token)
            if kind is not None:
                self._notes["failed"] = kind.__name__
            track = self._track or outer.track
            outer.sink.add(Span(self._name, track, self._start_s, end_s, self._notes))


@asynccontextmanager
async def place(
    gate: asyncio.Semaphore, name: str, track: Track | None = None
) -> AsyncIterator[None]:
    """`async with gate`, with a span called `name` if it had to be waited for."""
    if gate.locked():
        with span(name, track):
            await gate.acquire()
    else:
        await gate.acquire()
    try:
        yield
    finally:
        gate.release()
