"""What the supervisor prints: permanent lines, and on a terminal one line that is rewritten."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

from megatron_matpo.obs.metrics_log import FILE_NAME, WHY
from megatron_matpo.obs.progress import eta_s, format_duration, format_progress, format_why
from megatron_matpo.obs.status import read_status

_SPINNER = "|/-\\"
_ERASE = "\r\x1b[2K"


class Console:
    """Writes to one stream; without a terminal only permanent lines appear."""

    def __init__(self, stream: TextIO, prefix: str = "") -> None:
        """`stream` is usually standard output; `prefix` begins every line of text."""
        self._stream, self._prefix = stream, prefix
        self._is_tty = stream.isatty()
        self._has_transient = False

    def line(self, text: str) -> None:
        """Print a permanent line (or several)."""
        lines = "\n".join(self._prefix + line for line in text.split("\n"))
        self._write(self._clearing() + lines + "\n")

    def transient(self, text: str) -> None:
        """Replace the live line; nothing without a terminal."""
        if not self._is_tty:
            return
        width = shutil.get_terminal_size().columns
        self._write(_ERASE + text[: max(1, width - 1)])
        self._has_transient = True

    def _clearing(self) -> str:
        had_transient, self._has_transient = self._has_transient, False
        return _ERASE if had_transient else ""

    def _write(self, text: str) -> None:
        # A closed terminal or pipe is no reason to end a run of days.
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


class View(Protocol):
    """What a supervisor shows while a run is on."""

    def update(self) -> None:
        """Show what is new; called every half second and once at the end."""
        ...


class ProgressView:
    """Follows a run's metrics and status files and shows them on a console."""

    def __init__(self, run_dir: Path, num_steps: int, console: Console) -> None:
        """Lines that the metrics file holds already belong to an earlier attempt."""
        self._run_dir, self._num_steps, self._console = run_dir, num_steps, console
        self._path = run_dir / FILE_NAME
        self._started = time.time()
        self._offset, self._inode = 0, 0
        self._step_times_s: list[float] = []
        self._ticks = 0
        if self._path.exists():
            state = self._path.stat()
            self._offset, self._inode = state.st_size, state.st_ino

    def update(self) -> None:
        """Print the steps that have finished since the last call, and the live line."""
        for metrics in self._new_lines():
            self._show_step(metrics)
        self._show_phase()

    def _show_step(self, metrics: dict[str, Any]) -> None:
        step = int(metrics["step"])
        seconds = metrics.get("time/step_s")
        if seconds:
            self._step_times_s.append(float(seconds))
        eta = eta_s(step, self._num_steps, self._step_times_s) if self._step_times_s else None
        self._console.line(format_progress(step, self._num_steps, metrics, eta))
        if why := metrics.get(WHY):
            self._console.line(format_why(str(why)))

    def _show_phase(self) -> None:
        self._ticks += 1
        spinner = _SPINNER[self._ticks % len(_SPINNER)]
        for status in read_status(self._run_dir):
            if status.role == "trainer" and status.rank == 0:
                step = f"step {status.step}/{self._num_steps}: " if status.step >= 0 else ""
                spent = format_duration(time.time() - status.updated_at)
                self._console.transient(f"{spinner} {step}{status.phase} {spent}")
                return
        spent = format_duration(time.time() - self._started)
        self._console.transient(f"{spinner} starting {spent}")

    def _new_lines(self) -> list[dict[str, Any]]:
        """Complete lines that were appended since the last call."""
        try:
            state = self._path.stat()
        except OSError:
            return []
        if self._inode and (state.st_ino != self._inode or state.st_size < self._offset):
            # A resumed trainer has rewritten the file without the steps that it will repeat.
            self._inode, self._offset = state.st_ino, state.st_size
            return []
        self._inode = state.st_ino
        if state.st_size <= self._offset:
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines() if line.strip()]
