"""`matpo logs`: all log files of a run as one, in order of time, and followed.

A line without a time of its own has the time of the line before it in its file. What is at the head
of a file without one has the file's first time; a file without any has the time of its last change.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from megatron_matpo.config.plan import LEADER, Plan
from megatron_matpo.errors import ConfigError
from megatron_matpo.launch.run_folder import PLAN_FILE

FOLDER = "logs"
_POLL_S = 0.5
# Of what was there before, when the user wants to follow.
_FOLLOW_LINES = 50
_HEAD_BYTES = 64 * 1024
# A time is looked for here only: later in a line it is what somebody talks about.
_TIME_CHARS = 80
_ISO = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d{1,9}))?(Z|[+-]\d\d:?\d\d)?")
_GLOG = re.compile(r"\b[IWEF](\d\d)(\d\d) (\d\d:\d\d:\d\d)\.(\d{1,9})")
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_AGO = re.compile(r"(\d+)([smhd])")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class LogsRequest:
    """The command line."""

    run_dir: str
    follow: bool = False
    role: str = ""
    node: int = -1
    since: str = ""
    lines: int = -1


@dataclass(frozen=True, order=True)
class Line:
    """One line of one log."""

    time: float
    """Unix time in seconds."""
    source: str
    number: int
    text: str


def show_logs(request: LogsRequest) -> int:
    """Print; with `follow` until Ctrl-C.

    Raises:
        ConfigError: not a run folder, or no log of that role and node, or `since` is no time.
    """
    run_dir = Path(request.run_dir)
    if not (run_dir / FOLDER).is_dir():
        raise ConfigError(f"{request.run_dir}: not a run folder (it has no {FOLDER}/)")
    since = _parse_since(request.since) if request.since else 0.0
    logs = RunLogs(run_dir, request.role, request.node)
    lines: Iterable[Line] = (line for line in logs.merged() if line.time >= since)
    last = request.lines if request.lines >= 0 else _FOLLOW_LINES if request.follow else -1
    if last >= 0:
        lines = deque(lines, maxlen=last)
    for line in lines:
        _print(line)
    known = ", ".join(path.stem for path in sorted((run_dir / FOLDER).glob("*.log")))
    if known and not logs.names and not request.follow:
        raise ConfigError(f"{request.run_dir}: no such log; there are {known}")
    with contextlib.suppress(KeyboardInterrupt):
        while request.follow:
            for line in logs.merged():
                _print(line)
            sys.stdout.flush()
            time.sleep(_POLL_S)
    return 0


class RunLogs:
    """The logs of a run, read as far as they are written."""

    def __init__(self, run_dir: Path, role: str = "", node: int = -1) -> None:
        """`role`: `trainer`, `engine-1`, `tool-*`; `node`: only roles of that node."""
        self._run_dir, self._role, self._node = run_dir, role, node
        self._files: dict[str, LogFile] = {}

    @property
    def names(self) -> list[str]:
        """Of the logs that were found so far."""
        return sorted(self._files)

    def merged(self) -> Iterator[Line]:
        """Whole lines that were added since the last call, in order of time."""
        plan = _read_plan(self._run_dir)
        for path in sorted((self._run_dir / FOLDER).glob("*.log")):
            name = path.stem
            node = _node_of(name, plan)
            if name not in self._files and self._is_wanted(name, node):
                many = plan is not None and plan.num_nodes > 1
                label = f"{name}@{node}" if many and node >= 0 else name
                self._files[name] = LogFile(path, label)
        return heapq.merge(*(file.new_lines() for file in self._files.values()))

    def _is_wanted(self, name: str, node: int) -> bool:
        if self._node >= 0 and node != self._node:
            return False
        role = self._role
        return not role or name == role or name.startswith(f"{role}-") or fnmatchcase(name, role)


class LogFile:
    """One file that grows, and may be cut off or replaced while it is read."""

    def __init__(self, path: Path, label: str) -> None:
        """Reading starts at the head."""
        self._path, self._label = path, label
        self._file: BinaryIO | None = None
        self._rest = b""
        self._number = 0
        self._time = 0.0

    def new_lines(self) -> Iterator[Line]:
        """Whole lines since the last call; times never go back."""
        if self._file is None and not self._open():
            return
        yield from self._read()
        if self._was_replaced():
            yield from self._flush()
            if self._open():
                yield from self._read()

    def _open(self) -> bool:
        if self._file is not None:
            self._file.close()
        self._file, self._rest = None, b""
        with contextlib.suppress(OSError):
            self._file = self._path.open("rb")
        if self._file is None:
            return False
        if self._time == 0.0:
            self._time = _first_time(self._file)
        return True

    def _was_replaced(self) -> bool:
        """Another file has the name now, or this one was cut off."""
        assert self._file is not None, "opened"
        try:
            there = os.stat(self._path)
        except OSError:
            return False
        own = os.fstat(self._file.fileno())
        is_other = (there.st_ino, there.st_dev) != (own.st_ino, own.st_dev)
        return is_other or own.st_size < self._file.tell()

    def _read(self) -> Iterator[Line]:
        assert self._file is not None, "opened"
        while block := self._file.read(1 << 20):
            *whole, self._rest = (self._rest + block).split(b"\n")
            for raw in whole:
                yield self._line(raw)

    def _flush(self) -> Iterator[Line]:
        """The unfinished last line of a file that is gone."""
        if self._rest:
            yield self._line(self._rest)

    def _line(self, raw: bytes) -> Line:
        # A progress bar rewrites its line; the last state is the one to see.
        text = raw.decode(errors="replace").rstrip("\r").rsplit("\r", 1)[-1]
        text = _ESCAPE.sub("", text)
        self._time = max(self._time, line_time(text, self._time) or 0.0)
        self._number += 1
        return Line(self._time, self._label, self._number, text)


def line_time(text: str, near: float) -> float | None:
    """The time at the head of a log line; `near` (Unix time) has the year where it is left out."""
    head = text[:_TIME_CHARS]
    if found := _ISO.search(head):
        day, clock, fraction, zone = found.groups()
        zone = "+00:00" if zone == "Z" else zone or ""
        with contextlib.suppress(ValueError):
            moment = datetime.fromisoformat(f"{day}T{clock}{zone}")
            return moment.timestamp() + float(f"0.{fraction or 0}")
    if found := _GLOG.search(head):
        month, day, clock, fraction = found.groups()
        year = datetime.fromtimestamp(near or time.time()).year
        with contextlib.suppress(ValueError):
            moment = datetime.fromisoformat(f"{year}-{month}-{day}T{clock}")
            return moment.timestamp() + float(f"0.{fraction}")
    return None


def _first_time(file: BinaryIO) -> float:
    """The first time in a file's head, else when it was changed last; the position stays."""
    changed = os.fstat(file.fileno()).st_mtime
    head = file.read(_HEAD_BYTES).decode(errors="replace")
    file.seek(0)
    times = (line_time(text, changed) for text in head.splitlines())
    return next((moment for moment in times if moment is not None), changed)


def _parse_since(text: str) -> float:
    if found := _AGO.fullmatch(text):
        ago = timedelta(seconds=int(found[1]) * _UNITS_S[found[2]])
        return (datetime.now() - ago).timestamp()
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ConfigError(
            f"--since {text}: expected 30s, 10m, 2h or 1d ago, or a time as 2026-01-31T12:00"
        ) from None


def _read_plan(run_dir: Path) -> Plan | None:
    """The run's plan; None before it has one, or if another version wrote it."""
    try:
        return Plan.from_json((run_dir / PLAN_FILE).read_text())
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _node_of(name: str, plan: Plan | None) -> int:
    """The node of a role instance; -1 if nobody can tell."""
    role, _, number = name.rpartition("-")
    if plan is None:
        return -1
    if name in ("manager", "evaluation", "trainer") or role.startswith("tool"):
        return LEADER
    if role == "trainer-node" and number.isdigit():
        return int(number)
    if role == "engine" and number.isdigit():
        return next((place.node for place in plan.engines if place.index == int(number)), -1)
    if role == "trainer" and number.isdigit():
        end = 0
        for node, ranks in enumerate(plan.trainer_ranks_per_node):
            end += ranks
            if int(number) < end:
                return node
    return -1


def _print(line: Line) -> None:
    print(f"{line.source:<12} | {line.text}")
