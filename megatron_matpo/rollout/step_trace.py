"""Spans of the manager, by step, also of work that outlives a step."""

from __future__ import annotations

from pathlib import Path

from megatron_matpo.obs.span_files import SpanFile, is_traced
from megatron_matpo.obs.spans import Span


class StepTrace:
    """A sink for all steps: each traced one gets what ended since the step before was over."""

    def __init__(self, run_dir: Path, attempt: float, every: int) -> None:
        """`every` is `obs.trace_every`; no step is open yet."""
        self._run_dir, self._attempt, self._every = run_dir, attempt, every
        self._step = -1
        self._file: SpanFile | None = None

    def add(self, span: Span) -> None:
        """As `Sink.add`."""
        if self._file is not None:
            self._file.add(span)

    def open(self, step: int) -> None:
        """What ends from now on belongs to `step`, until another one is opened."""
        if step == self._step:
            return
        self.close()
        self._step = step
        if is_traced(self._every, step):
            self._file = SpanFile(self._run_dir, "manager", step, self._attempt)

    def close(self) -> None:
        """Nothing is kept any more."""
        if self._file is not None:
            self._file.end()
        self._file, self._step = None, -1
