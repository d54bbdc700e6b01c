"""`RUN/trace/spans/step_N.ROLE.jsonl`: the finished spans of one process and step.

The first line says who wrote it, in which attempt of the run, and what the process's monotonic
clock showed at which wall-clock time; each further line is `[name, unit, row, start, end, notes]`
in microseconds of that monotonic clock. A thread writes, a moment behind what it records, so a
process that is killed leaves all but its last second; a line cut short is not read.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_matpo.obs.spans import Span

FOLDER = Path("trace") / "spans"
WRITE_EVERY_S = 1.0
_RUN_FILE = "run.json"  # the supervisor writes it at the start of every attempt

# `json.dumps` with separators makes an encoder for every call, which is most of its time.
_encode = json.JSONEncoder(separators=(",", ":")).encode
_log = logging.getLogger(__name__)


def is_traced(every: int, step: int) -> bool:
    """Whether `obs.trace_every` asks for the spans of `step`: the first one and every Nth."""
    return every > 0 and (step == 1 or step % every == 0)


def attempt_of(run_dir: Path) -> float:
    """When the present attempt of the run was started; 0 where no supervisor did."""
    try:
        return float(json.loads((run_dir / _RUN_FILE).read_text())["started_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


class SpanFile:
    """A sink that writes in the background.

    A disk that refuses the file ends the file, not the run.
    """

    def __init__(self, run_dir: Path, role: str, step: int, attempt: float) -> None:
        """`role` is as `trainer-0`; an earlier attempt's file of the same step is replaced."""
        self.path = run_dir / FOLDER / f"step_{step:06d}.{role}.jsonl"
        self._header: dict[str, str | int | float] = {
            "role": role,
            "step": step,
            "attempt": attempt,
            "wall_us": _us(time.time()),
            "monotonic_us": _us(time.monotonic()),
        }
        self._waiting: deque[Span] = deque()
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._write, name="spans", daemon=True)
        self._thread.start()

    def add(self, span: Span) -> None:
        """As `Sink.add`."""
        self._waiting.append(span)

    def end(self) -> None:
        """Let the thread write what is left; not waited for, so no step waits for a disk."""
        self._is_done.set()

    def wait(self, timeout_s: float) -> None:
        """Until everything is written."""
        self._thread.join(timeout_s)

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w", encoding="utf-8") as file:
                file.write(json.dumps(self._header) + "\n")
                is_last = False
                while not is_last:
                    is_last = self._is_done.wait(WRITE_EVERY_S)
                    while self._waiting:
                        file.write(_line(self._waiting.popleft()))
                    file.flush()
        except OSError as error:
            _log.warning("%s: the trace of this step is not complete: %s", self.path, error)


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def _line(span: Span) -> str:
    unit, row = span.track
    fields = (span.name, unit, row, _us(span.start_s), _us(span.end_s), span.notes)
    return _encode(fields) + "\n"


@dataclass(frozen=True, slots=True)
class StoredSpan:
    """A span of a file, in microseconds of the wall clock."""

    name: str
    unit: str
    row: str
    start_us: int
    end_us: int
    notes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredSpans:
    """One file."""

    role: str
    attempt: float
    spans: tuple[StoredSpan, ...]


def traced_steps(run_dir: Path) -> list[int]:
    """Steps that have spans, in order."""
    names = {path.name.partition(".")[0] for path in (run_dir / FOLDER).glob("step_*.*.jsonl")}
    return sorted(int(name.removeprefix("step_")) for name in names)


def read_spans(run_dir: Path, step: int) -> list[StoredSpans]:
    """What the processes of the newest attempt that reached `step` recorded of it.

    A file that an earlier attempt left, because the process that would replace it did not get so
    far this time, is left out: its times are those of other work.
    """
    paths = sorted((run_dir / FOLDER).glob(f"step_{step:06d}.*.jsonl"))
    files = [file for path in paths if (file := _read(path)) is not None]
    newest = max((file.attempt for file in files), default=0.0)
    return [file for file in files if file.attempt == newest]


def _read(path: Path) -> StoredSpans | None:
    """None for a file whose first line was never written."""
    first, *lines = path.read_bytes().split(b"\n")
    try:
        header = json.loads(first)
        shift_us = header["wall_us"] - header["monotonic_us"]
        role, attempt = header["role"], header["attempt"]
    except (ValueError, KeyError, TypeError):
        return None
    spans: list[StoredSpan] = []
    for line in lines:
        try:
            name, unit, row, start_us, end_us, notes = json.loads(line)
        except (ValueError, TypeError):
            continue  # cut short, or the empty rest after the last line
        spans.append(StoredSpan(name, unit, row, start_us + shift_us, end_us + shift_us, notes))
    return StoredSpans(role, attempt, tuple(spans))
