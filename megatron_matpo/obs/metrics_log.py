"""`RUN/metrics.jsonl`: one JSON object per training step, of names in `metrics.METRICS` only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_matpo.obs.files import write_atomic
from megatron_matpo.obs.metrics import check

FILE_NAME = "metrics.jsonl"
WHY = "why"
"""The one field that is a text: see `obs.why`."""


class MetricsWriter:
    """Appends to `RUN/metrics.jsonl`; one writer per run."""

    def __init__(self, run_dir: str | Path) -> None:
        """Open the file; a last line that a crash cut short is removed."""
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._rewrite(_read_lines(self.path))

    def write(
        self, step: int, values: Mapping[str, float], *, partial: bool = False, why: str = ""
    ) -> None:
        """Append one line with `step`, `values` and `why` if there is one; it is then on disk.

        A NaN or infinite value is written as null: JSON has no such numbers. `partial` is for lines
        that are not a training step (an evaluation before the first one).

        Raises:
            ValueError: unknown name, not a number, or a required name is missing.
        """
        check(values, partial=partial)
        line: dict[str, float | str | None] = {"step": step}
        line |= {
            name: value if math.isfinite(value) else None
            for name, value in values.items()
            if name != "step"
        }
        if why:
            line[WHY] = why
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(descriptor, data)  # one call: lines of two writers cannot mix
            if written != len(data):
                raise OSError(
                    f"{self.path}: wrote {written} of {len(data)} bytes; is the disk full?"
                )
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def truncate_after(self, step: int) -> None:
        """Drop lines with a larger step (a resumed run writes them again)."""
        if self.path.exists():
            lines = _read_lines(self.path)
            kept = [line for line in lines if float(line["step"] or 0) <= step]
            if len(kept) < len(lines):
                self._rewrite(kept)

    def _rewrite(self, lines: Iterable[Mapping[str, object]]) -> None:
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines))


def read_metrics(run_dir: str | Path) -> list[dict[str, float | None]]:
    """The numbers of all complete lines of a run, in order; empty if there are none."""
    path = Path(run_dir) / FILE_NAME
    return [
        {name: value for name, value in line.items() if not isinstance(value, str)}
        for line in (_read_lines(path) if path.exists() else [])
    ]


def read_why(run_dir: str | Path) -> dict[int, str]:
    """Step -> why it was slow, of the steps of which something was said."""
    path = Path(run_dir) / FILE_NAME
    lines = _read_lines(path) if path.exists() else []
    return {int(line["step"] or 0): str(line[WHY]) for line in lines if line.get(WHY)}


def _read_lines(path: Path) -> list[dict[str, float | str | None]]:
    lines: list[dict[str, float | str | None]] = []
    for raw in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(raw) if raw.strip() else None
        except ValueError:
            continue  # cut short by a crash
        if isinstance(value, dict) and "step" in value:
            lines.append(value)
    return lines
