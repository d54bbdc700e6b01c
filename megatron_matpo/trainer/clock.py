"""Wall-clock time by phase, shown live, written to the metrics and recorded as spans."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_matpo.obs.spans import Span
from megatron_matpo.obs.status import PhaseWriter
from megatron_matpo.obs.step_spans import StepSpans

PHASES = ("rollout", "score", "train", "sync")
_BETWEEN = "between phases"


class Clock:
    """Adds up phases of the present step; the status file always names the phase that runs."""

    def __init__(self, status: PhaseWriter, spans: StepSpans | None = None) -> None:
        """`status` is written at every change of phase; `spans` get each phase when it ends."""
        self._status = status
        self._spans = spans
        self._step = -1
        self._spent: dict[str, float] = {}
        self.current = "start"
        """Phase that runs; a failure report names it."""
        self._since_s = time.monotonic()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Time a whole step; forgets the step before."""
        started_s = self.enter(_BETWEEN)
        if self._spans is not None:
            self._spans.begin(step)
        self._step = step
        self._spent = dict.fromkeys((*PHASES, "step"), 0.0)
        yield
        self._spent["step"] = time.monotonic() - started_s

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase. On an error the phase stays current, so that reports can name it."""
        started_s = self.enter(name)
        yield
        ended_s = self.enter(_BETWEEN)
        self._spent[name] = self._spent.get(name, 0.0) + ended_s - started_s

    def enter(self, name: str) -> float:
        """Name a phase, which lasts until the next one; returns when it began."""
        now_s = time.monotonic()
        if self._spans is not None and self.current != _BETWEEN:
            self._spans.add(Span(self.current, ("", ""), self._since_s, now_s, {}))
        self.current, self._since_s = name, now_s
        self._status.set(name, self._step)
        return now_s

    @property
    def metrics(self) -> dict[str, float]:
        """`time/PHASE_s` of the present step."""
        return {f"time/{name}_s": seconds for name, seconds in self._spent.items()}

    @property
    def spans(self) -> Sequence[Span]:
        """Finished spans since the step began: phases, and what was measured inside them."""
        return self._spans.spans if self._spans is not None else ()
