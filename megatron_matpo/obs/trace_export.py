"""Spans of one step -> `RUN/trace/step_N.json`, which https://ui.perfetto.dev opens.

Source: "Trace Event Format" (Google), complete events (`ph: X`) and metadata events (`ph: M`), in
microseconds. A process row for each kind of work, a track for each episode slot or rank. Viewers
draw a track as a stack, so its spans must be nested or apart; what overlaps (calls of one turn)
gets tracks of its own.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_matpo.errors import ConfigError
from megatron_matpo.obs.files import write_atomic
from megatron_matpo.obs.span_files import StoredSpan, StoredSpans, read_spans, traced_steps

QUEUE, SCORE = "queue", "score"
"""Rows of an episode in which it has no slot: before it got one, and while it is graded."""
_ROWS_APART = {QUEUE: "waiting for a slot", SCORE: "grading"}


@dataclass(frozen=True, slots=True)
class _Placed:
    """A span and where it is drawn."""

    process: str
    slot: int
    row: str
    lane: int
    span: StoredSpan


def export_trace(run_dir: Path, step: int | None = None) -> Path:
    """Write the trace of `step` (None: the newest that has one) and return its path.

    Raises:
        ConfigError: there are no spans of that step.
    """
    steps = traced_steps(run_dir)
    if step is None and steps:
        step = steps[-1]
    if step is None or step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ConfigError(
            f"{run_dir}: no spans of step {step if step is not None else 'any'}; traced steps: "
            f"{there}; obs.trace_every says which are (1: all)"
        )
    path = run_dir / "trace" / f"step_{step:06d}.json"
    trace = trace_events(read_spans(run_dir, step))
    write_atomic(path, json.dumps(trace, separators=(",", ":")), durable=False)
    return path


def trace_events(files: Sequence[StoredSpans]) -> dict[str, Any]:
    """The trace as the viewer reads it; its time begins with the first span."""
    placed = [item for file in files for item in _place(file)]
    zero_us = min((item.span.start_us for item in placed), default=0)
    processes = {name: pid for pid, name in enumerate(_processes(placed), 1)}
    tracks = sorted({_track(item) for item in placed})
    # Perfetto takes the track whose number is its process's for a main thread, and shows it first.
    tids = {track: tid for tid, track in enumerate(tracks, len(processes) + 1)}
    events = [_meta("process_name", pid, 0, name=name) for name, pid in processes.items()]
    events += [_meta("process_sort_index", pid, 0, sort_index=pid) for pid in processes.values()]
    for track, tid in tids.items():
        pid = processes[track[0]]
        events.append(_meta("thread_name", pid, tid, name=_track_name(*track)))
        events.append(_meta("thread_sort_index", pid, tid, sort_index=tid))
    for item in placed:
        span, track = item.span, _track(item)
        unit = {"episode": span.unit} if span.unit else {}
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "cat": item.process,
                "ts": span.start_us - zero_us,
                "dur": span.end_us - span.start_us,
                "pid": processes[item.process],
                "tid": tids[track],
                "args": unit | span.notes,
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _meta(kind: str, pid: int, tid: int, **values: str | int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": values}


def _processes(placed: Iterable[_Placed]) -> list[str]:
    """Process rows from top to bottom: trainer, episodes, and what waits, as far as they exist."""
    names = {item.process for item in placed}
    last = set(_ROWS_APART.values())
    return sorted(names, key=lambda name: (name in last, name != "trainer", name))


def _track(item: _Placed) -> tuple[str, int, str, int]:
    return item.process, item.slot, item.row, item.lane


def _track_name(process: str, slot: int, row: str, lane: int) -> str:
    head = f"rank {slot}" if process == "trainer" else f"slot {slot}"
    return " ".join(part for part in (head, row, f"({lane + 1})" if lane else "") if part)


def _place(file: StoredSpans) -> list[_Placed]:
    role, _, rank = file.role.partition("-")
    if role == "trainer":
        rows = {(role, int(rank), ""): list(file.spans)}
    else:
        rows = _rows_of_episodes(file.spans, "episodes" if not rank else f"evaluation of {rank}")
    return [
        _Placed(process, slot, row, lane, span)
        for (process, slot, row), spans in rows.items()
        for lane, inside in enumerate(lanes(spans))
        for span in inside
    ]


def _rows_of_episodes(
    spans: Sequence[StoredSpan], process: str
) -> dict[tuple[str, int, str], list[StoredSpan]]:
    """Spans by (process, slot, row). An episode keeps its slot from its first span to its last."""
    units: dict[str, dict[str, list[StoredSpan]]] = defaultdict(lambda: defaultdict(list))
    for span in spans:
        units[_ROWS_APART.get(span.row, process)][span.unit].append(span)
    rows: dict[tuple[str, int, str], list[StoredSpan]] = defaultdict(list)
    for name, episodes in units.items():
        wholes = [
            StoredSpan(unit, unit, "", min(s.start_us for s in own), max(s.end_us for s in own), {})
            for unit, own in episodes.items()
        ]
        for slot, taken in enumerate(lanes(wholes, may_nest=False)):
            for span in (span for whole in taken for span in episodes[whole.unit]):
                rows[name, slot, span.row if name == process else ""].append(span)
    return rows


def lanes(spans: Sequence[StoredSpan], *, may_nest: bool = True) -> list[list[StoredSpan]]:
    """`spans` on as few tracks as first fit finds; on each, any two are nested or apart.

    Without `may_nest` they are all apart.
    """
    # Of equal spans the one that was finished last is the outer one.
    order = sorted(range(len(spans)), key=lambda i: (spans[i].start_us, -spans[i].end_us, -i))
    found: list[list[StoredSpan]] = []
    open_ends: list[list[int]] = []
    for span in (spans[index] for index in order):
        lane = 0
        while lane < len(found):
            ends = open_ends[lane]
            while ends and ends[-1] <= span.start_us:
                ends.pop()
            if not ends or (may_nest and span.end_us <= ends[-1]):
                break
            lane += 1
        else:
            found.append([])
            open_ends.append([])
        open_ends[lane].append(span.end_us)
        found[lane].append(span)
    return found
