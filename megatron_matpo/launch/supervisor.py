"""Starts the roles of a run, watches them, names the first failure, and stops everything.

States: starting (until every role is ready) -> running -> stopping. Whatever ends the run (the
trainer is done, a role failed, a signal, a deadline), the way out is the same: every descendant is
stopped before `run` returns.

Exit codes: 0 done, 1 a role failed, 2 a role says that the configuration is wrong, 130 Ctrl-C,
143 SIGTERM.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_matpo.launch.console import Console, View
from megatron_matpo.launch.origin import Death, Origin, find_origin
from megatron_matpo.launch.process import Child, reap_orphans, start, stop_all
from megatron_matpo.launch.roles import RoleSpec
from megatron_matpo.obs.failure import first_failure
from megatron_matpo.obs.progress import format_duration

_POLL_S = 0.1
# Probes, status files and /proc are looked at less often than the children themselves.
_LOOK_EVERY_S = 0.5
# After a role has ended, its peers get this long to record why.
_SETTLE_S = 1.0
# A role that has recorded a failure but does not end is not waited for longer than this.
_LINGER_S = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Limits:
    """Deadlines of a supervised run, in seconds."""

    start_timeout_s: float
    """`run.start_timeout_s`"""
    stop_grace_s: float
    """`run.stop_grace_s`"""


class Supervisor:
    """Runs one set of roles once. Must be used from the main thread (it handles signals)."""

    def __init__(
        self,
        run_dir: Path,
        roles: Sequence[RoleSpec],
        limits: Limits,
        console: Console,
        view: View,
    ) -> None:
        """`run_dir` holds `logs/` and `status/`; exactly one role has `ends_run`."""
        self._run_dir, self._roles, self._limits = run_dir, roles, limits
        self._console, self._view = console, view
        self._children: dict[str, Child] = {}
        self._log_offsets: dict[str, int] = {}
        self._waiting = {role.name: role for role in roles}
        self._signals: list[int] = []
        self._started_at = 0.0
        self._next_look = 0.0

    def run(self) -> int:
        """Start the roles, wait for the end, stop everything; returns the exit code."""
        for number in _SIGNALS:
            # Under nohup SIGHUP is ignored, and stays so.
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:
                signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        self._started_at = time.monotonic()
        self._remember_logs()
        try:
            return self._start() or self._watch()
        finally:
            stop_all(
                list(self._children.values()),
                self._limits.stop_grace_s,
                in_a_hurry=lambda: len(self._signals) > 1,
            )

    def _on_signal(self, signal_number: int, frame: FrameType | None) -> None:
        self._signals.append(signal_number)

    def _start(self) -> int:
        """Start all roles at once: they load in parallel. Returns 0, or the exit code."""
        for role in self._roles:
            log = self._log(role.name)
            try:
                self._children[role.name] = start(role.name, role.argv, role.env, log)
            except OSError as error:
                what = f"cannot start {role.argv[0]}: {error.strerror or error}"
                return self._fail(Origin(role.name, "start", what, role.name))
        return 0

    def _watch(self) -> int:
        """Wait until the run is over, well or not."""
        while True:
            if self._signals:
                return self._interrupted()
            ended = [child for child in self._children.values() if child.exit_code is not None]
            if any(child.exit_code == 0 and self._ends_run(child) for child in ended):
                self._view.update()
                return 0
            if ended:
                return self._role_ended(ended)
            if time.monotonic() >= self._next_look:
                if self._has_lingering_failure():
                    return self._role_ended([])
                if not self._probe():
                    return self._fail(self._not_ready())
                self._view.update()
                reap_orphans(list(self._children.values()))
                self._next_look = time.monotonic() + _LOOK_EVERY_S
            time.sleep(_POLL_S)

    def _probe(self) -> bool:
        """Ask roles that are not ready; False when they had long enough."""
        for role in list(self._waiting.values()):
            if role.is_ready():
                del self._waiting[role.name]
                elapsed = time.monotonic() - self._started_at
                self._console.line(f"{role.name} ready after {elapsed:.1f} s")
        elapsed = time.monotonic() - self._started_at
        return not self._waiting or elapsed < self._limits.start_timeout_s

    def _not_ready(self) -> Origin:
        """Names the first role that is still not ready."""
        name = next(iter(self._waiting))
        others = [other for other in self._waiting if other != name]
        also = f" (nor are {', '.join(others)})" if others else ""
        what = (
            f"DeadlineError: not ready within run.start_timeout_s="
            f"{self._limits.start_timeout_s:g}{also}"
        )
        return Origin(name, "start", what, name)

    def _has_lingering_failure(self) -> bool:
        failure = first_failure(self._run_dir)
        return failure is not None and time.time() - failure.time > _LINGER_S

    def _role_ended(self, ended: Sequence[Child]) -> int:
        """A role has stopped or failed; give its peers a moment, then name the origin."""
        now = time.time()
        deaths = [Death(child.name, child.exit_code or 0, now) for child in ended]
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline and first_failure(self._run_dir) is None:
            time.sleep(_POLL_S)
        self._view.update()
        origin = find_origin(self._run_dir, deaths)
        assert origin is not None, "called because something failed"
        return self._fail(origin)

    def _fail(self, origin: Origin) -> int:
        skip_bytes = self._log_offsets.get(origin.log_name, 0)
        elapsed = format_duration(time.monotonic() - self._started_at)
        self._console.line(
            f"the run failed after {elapsed}; stopping everything\n"
            + origin.report(self._log(origin.log_name), skip_bytes)
        )
        return origin.exit_code

    def _interrupted(self) -> int:
        number = self._signals[0]
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self._console.line(f"{name}: stopping everything; the same command resumes what was saved")
        return 130 if number == signal.SIGINT else 143

    def _ends_run(self, child: Child) -> bool:
        return any(role.ends_run for role in self._roles if role.name == child.name)

    def _log(self, name: str) -> Path:
        return self._run_dir / "logs" / f"{name}.log"

    def _remember_logs(self) -> None:
        """Logs are appended to; what is there now belongs to earlier attempts."""
        for log in (self._run_dir / "logs").glob("*.log"):
            self._log_offsets[log.stem] = os.stat(log).st_size
