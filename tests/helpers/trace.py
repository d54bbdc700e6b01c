"""What a trace file must be, whatever is in it."""

from __future__ import annotations

import itertools
from typing import Any


def overlaps(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Two (start, end) that are neither apart nor nested."""
    a, b = sorted((first, second), key=lambda item: (item[0], -item[1]))
    return b[0] < a[1] < b[1]


def check_trace(trace: dict[str, Any]) -> dict[tuple[int, int], tuple[str, str]]:
    """Assert the format, and that no spans of a track overlap.

    Returns:
        (pid, tid) -> (name of the process, name of the track).
    """
    assert trace.keys() == {"traceEvents", "displayTimeUnit"}
    processes: dict[int, str] = {}
    tracks: dict[tuple[int, int], tuple[str, str]] = {}
    drawn: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in trace["traceEvents"]:
        key = event["pid"], event["tid"]
        assert all(isinstance(v, str | int | float | bool) for v in event["args"].values())
        if event["ph"] == "M":
            assert event.keys() == {"ph", "name", "pid", "tid", "args"}
            if event["name"] == "process_name":
                processes[event["pid"]] = event["args"]["name"]
            if event["name"] == "thread_name":
                assert key not in tracks
                tracks[key] = processes[event["pid"]], event["args"]["name"]
            continue
        assert event.keys() == {"ph", "name", "cat", "ts", "dur", "pid", "tid", "args"}
        assert event["ph"] == "X"
        assert isinstance(event["name"], str)
        assert all(type(event[name]) is int and event[name] >= 0 for name in ("ts", "dur"))
        drawn.setdefault(key, []).append((event["ts"], event["ts"] + event["dur"]))
    assert drawn.keys() == tracks.keys()
    assert len(set(tracks.values())) == len(tracks)
    for items in drawn.values():
        assert not any(overlaps(*pair) for pair in itertools.combinations(items, 2))
    return tracks
