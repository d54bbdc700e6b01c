"""Wall-clock time by phase, shown live and written to the metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_matpo.obs.status import PhaseWriter

PHASES = ("rollout", "score", "train", "sync")


class Clock:
    """Adds up phases of the present step; the status file always names the phase that runs."""

    def __init__(self, status: PhaseWriter) -> None:
        """`status` is written at every change of phase."""
        self._status = status
        self._step = -1
        self._spent: dict[str, float] = {}
        self.current = "start"
        """Phase that runs; a failure report names it."""

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Time a whole step; forgets the step before."""
        self._step = step
        self._spent = dict.fromkeys((*PHASES, "step"), 0.0)
        started = time.perf_counter()
        yield
        self._spent["step"] = time.perf_counter() - started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase. On an error the phase stays current, so that reports can name it."""
        self.enter(name)
        started = time.perf_counter()
        yield
        self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - started
        self.enter("between phases")

    def enter(self, name: str) -> None:
        """Name a phase that is not timed."""
        self.current = name
        self._status.set(name, self._step)

    @property
    def metrics(self) -> dict[str, float]:
        """`time/PHASE_s` of the present step."""
        return {f"time/{name}_s": seconds for name, seconds in self._spent.items()}
