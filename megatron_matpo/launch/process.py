"""Child processes that cannot outlive their supervisor, on Linux.

* Each child has its own session, so that a Ctrl-C in the terminal reaches only the supervisor.
* Each child gets SIGTERM when the supervisor dies (PR_SET_PDEATHSIG).
* The supervisor is a child subreaper: what its children leave behind becomes its own child, so that
  every descendant can be found in /proc and stopped.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.05
# Orphans of a role that has already stopped get this long, not the whole grace period.
_ORPHAN_GRACE_S = 2.0

# A process that waits for a disk does not end at once.
_SESSION_S = 5.0

# Loaded before any fork: a child must not load libraries between fork and exec.
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Child:
    """A running or ended child process and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -N if signal N ended it."""
        return self.process.poll()


def die_with_parent(parent_pid: int, signal_number: int = signal.SIGTERM) -> None:
    """Have the kernel send `signal_number` to this process when its parent ends.

    `parent_pid` is who the parent should be: if it ended before the call, this process ends now.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(143)


def become_subreaper() -> None:
    """Adopt every orphaned descendant from now on."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def start(name: str, argv: Sequence[str], env: Mapping[str, str], log: Path) -> Child:
    """Start a child in its own session; stdout and stderr are appended to `log`.

    Raises:
        OSError: the program cannot be started.
    """
    parent_pid = os.getpid()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        process = subprocess.Popen(
            list(argv),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: _begin(parent_pid),
        )
    return Child(name, process, log)


def _begin(parent_pid: int) -> None:
    """In the child, before it becomes its program."""
    # A scheduler sends it to every process of a job; only the supervisor knows what to do.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    die_with_parent(parent_pid)


def descendants(pid: int) -> list[int]:
    """Living descendants of `pid` (zombies left out), children before grandchildren."""
    table = _process_table()
    children: dict[int, list[int]] = {}
    for child, entry in table.items():
        children.setdefault(entry.parent, []).append(child)
    found: list[int] = []
    queue = [pid]
    while queue:
        queue = [child for parent in queue for child in children.get(parent, [])]
        found += queue
    return [child for child in found if table[child].state not in "ZX"]


class _Entry(NamedTuple):
    """A process of /proc."""

    parent: int
    state: str
    session: int


def _process_table() -> dict[int, _Entry]:
    """All processes by id."""
    table: dict[int, _Entry] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            text = Path(entry.path, "stat").read_text()
        except OSError:
            continue
        # The command in parentheses may hold spaces and parentheses itself.
        state, parent, _, session = text.rsplit(")", 1)[1].split()[:4]
        table[int(entry.name)] = _Entry(int(parent), state, int(session))
    return table


def stop_all(
    children: Sequence[Child],
    grace_s: float,
    in_a_hurry: Callable[[], bool] = lambda: False,
    signals: Mapping[str, int] | None = None,
) -> list[int]:
    """Stop every descendant of this process: SIGTERM, up to `grace_s` seconds, then SIGKILL.

    The direct `children` are asked first, so that each can stop its own helpers in order; what is
    left when they have ended is asked next. The grace ends early when `in_a_hurry()` is true.
    `signals` names children that are asked with another signal than SIGTERM.

    Returns:
        Process ids that had to be killed.
    """
    for child in children:
        if child.exit_code is None:
            _send(child.process.pid, (signals or {}).get(child.name, signal.SIGTERM))
    deadline = time.monotonic() + grace_s
    while any(child.exit_code is None for child in children):
        if time.monotonic() > deadline or in_a_hurry():
            break
        reap_orphans(children)
        time.sleep(_POLL_S)
    for pid in descendants(os.getpid()):
        _send(pid, signal.SIGTERM)
    deadline = time.monotonic() + min(grace_s, _ORPHAN_GRACE_S)
    while descendants(os.getpid()) and time.monotonic() < deadline and not in_a_hurry():
        reap_orphans(children)
        time.sleep(_POLL_S)
    return _kill_rest(children)


def reap_orphans(children: Sequence[Child]) -> None:
    """Collect ended processes that were adopted; those of `children` keep their exit codes."""
    own = {child.process.pid for child in children}
    for child in children:
        child.process.poll()
    for pid, entry in _process_table().items():
        if entry.parent == os.getpid() and entry.state == "Z" and pid not in own:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def kill_session(pid: int) -> None:
    """SIGKILL everything in the session that the child `pid` began; frozen processes end, too.

    A server's own helpers would hold its ports and its memory when it is started anew.
    """
    deadline = time.monotonic() + _SESSION_S
    while time.monotonic() < deadline:
        living = [
            number
            for number, entry in _process_table().items()
            if entry.session == pid and entry.state not in "ZX"
        ]
        if not living:
            return
        for number in living:
            _send(number, signal.SIGKILL)
        time.sleep(_POLL_S)


def _kill_rest(children: Sequence[Child]) -> list[int]:
    """SIGKILL descendants until none is left; a process can fork while the list is read."""
    killed: list[int] = []
    while rest := descendants(os.getpid()):
        for pid in rest:
            _send(pid, signal.SIGKILL)
        killed += rest
        time.sleep(_POLL_S)
        reap_orphans(children)
    reap_orphans(children)
    return list(dict.fromkeys(killed))


def _send(pid: int, signal_number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal_number)
