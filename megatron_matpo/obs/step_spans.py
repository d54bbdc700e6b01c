"""The spans of a trainer rank: those of the present step in memory, traced steps also in a file."""

from __future__ import annotations

from pathlib import Path

from megatron_matpo.obs.span_files import SpanFile, attempt_of, is_traced
from megatron_matpo.obs.spans import Span

WRITE_TIMEOUT_S = 10.0
"""How long the end of a process may wait for its last spans."""


class StepSpans:
    """A sink whose spans belong to a step from its beginning until the next one's."""

    def __init__(self, run_dir: Path, role: str) -> None:
        """`role` is as `trainer-0`. Nothing is written before `trace`."""
        self._run_dir, self._role = run_dir, role
        self._attempt = attempt_of(run_dir)
        self._every = 0
        self._file: SpanFile | None = None
        self.spans: list[Span] = []
        """Of the present step; finished ones."""

    def trace(self, every: int) -> None:
        """From the next step on, write the steps that `obs.trace_every` asks for."""
        self._every = every

    def add(self, span: Span) -> None:
        """As `Sink.add`."""
        self.spans.append(span)
        if self._file is not None:
            self._file.add(span)

    def begin(self, step: int) -> None:
        """What is finished from now on belongs to `step`."""
        self._end_file()
        self.spans = []
        if is_traced(self._every, step):
            self._file = SpanFile(self._run_dir, self._role, step, self._attempt)

    def close(self) -> None:
        """Write the rest; the process is about to end."""
        file = self._end_file()
        if file is not None:
            file.wait(WRITE_TIMEOUT_S)

    def _end_file(self) -> SpanFile | None:
        file, self._file = self._file, None
        if file is not None:
            file.end()
        return file
