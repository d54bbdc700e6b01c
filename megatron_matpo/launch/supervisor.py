"""Starts the roles of a node, watches them, names the first failure, and stops everything.

States: starting (until every role is ready) -> running -> (saving) -> stopping. Whatever ends the
run (the trainer is done, a role failed, a signal, a deadline, another node), the way out is the
same: every descendant is stopped before `run` returns.

With several nodes every node has a supervisor. They tell each other of ended roles through the run
folder (`launch.meeting`); the leader alone decides when the run is over, and names the failure.

Exit codes: 0 done, 1 a role failed (or did not save in time), 2 a role says that the configuration
is wrong, 75 ended early on request, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_matpo.launch.console import Console, View
from megatron_matpo.launch.meeting import Meeting
from megatron_matpo.launch.origin import Death, Origin, find_origin
from megatron_matpo.launch.process import Child, reap_orphans, start, stop_all
from megatron_matpo.launch.restarts import Restarts
from megatron_matpo.launch.roles import RoleSpec, trainer_has_begun
from megatron_matpo.launch.stopping import STOPPED_EARLY, StopSignals
from megatron_matpo.obs.failure import first_failure, write_reason
from megatron_matpo.obs.progress import format_duration
from megatron_matpo.obs.status import read_status
from megatron_matpo.obs.stop_request import STOPPED_PHASE, request_stop

_POLL_S = 0.1
# Probes, status files and /proc are looked at less often than the children themselves.
_LOOK_EVERY_S = 0.5
# After a role has ended, its peers get this long to record why; other nodes' words take longer.
_SETTLE_S = 1.0
_SETTLE_NODES_S = 4.0
# A role that has recorded a failure but does not end is not waited for longer than this.
_LINGER_S = 5.0
# A node whose role has ended waits this long for the leader to end the run.
_LEADER_S = 20.0


@dataclass(frozen=True)
class Limits:
    """Deadlines of a supervised run, in seconds."""

    start_timeout_s: float
    """`run.start_timeout_s`"""
    stop_grace_s: float
    """`run.stop_grace_s`"""
    save_timeout_s: float = 0.0
    """`run.save_timeout_s`; 0: the run has nothing to save and stops at once."""
    save_on_stop: bool = False
    """`run.save_on_stop`"""


class Supervisor:
    """Runs one node's roles once. Must be used from the main thread (it handles signals)."""

    def __init__(
        self,
        run_dir: Path,
        roles: Sequence[RoleSpec],
        limits: Limits,
        console: Console,
        view: View,
        meeting: Meeting,
    ) -> None:
        """`run_dir` holds `logs/` and `status/`; on the leader exactly one role has `ends_run`."""
        self._run_dir, self._roles, self._limits = run_dir, roles, limits
        self._console, self._view, self._meeting = console, view, meeting
        self._children: dict[str, Child] = {}
        self._log_offsets: dict[str, int] = {}
        self._waiting = {role.name: role for role in roles}
        self._restarts = Restarts(run_dir, roles, console, self._start_role, limits.start_timeout_s)
        self._lost: list[Death] = []
        self._stop = StopSignals(save_on_stop=limits.save_on_stop)
        self._save_until: float | None = None
        self._reason = ""
        self._started_at = 0.0
        self._next_look = 0.0

    def run(self) -> int:
        """Start the roles, wait for the end, stop everything; returns the exit code."""
        self._stop.install()
        self._started_at = time.monotonic()
        self._remember_logs()
        code = 1
        try:
            code = self._start() or self._watch()
        finally:
            self._meeting.leave(code, self._reason)
            stop_all(
                list(self._children.values()),
                self._limits.stop_grace_s,
                in_a_hurry=lambda: self._stop.in_a_hurry,
                signals={role.name: role.stop_signal for role in self._roles},
            )
        return code

    def _start(self) -> int:
        """Start all roles at once: they load in parallel. Returns 0, or the exit code."""
        for role in self._roles:
            try:
                self._children[role.name] = self._start_role(role)
            except OSError as error:
                what = f"cannot start {role.argv[0]}: {error.strerror or error}"
                return self._fail(Origin(role.name, "start", what, role.name))
        return 0

    def _start_role(self, role: RoleSpec) -> Child:
        return start(role.name, role.argv, role.env, self._log(role.name))

    def _watch(self) -> int:
        """Wait until the run is over, well or not."""
        while True:
            code = self._on_signal()
            if code is None:
                code = self._on_children()
            if code is None and time.monotonic() >= self._next_look:
                code = self._look()
                self._next_look = time.monotonic() + _LOOK_EVERY_S
            if code is not None:
                return code
            time.sleep(_POLL_S)

    def _on_signal(self) -> int | None:
        if self._stop.wants_stop or (self._stop.wants_save and self._has_nothing_to_save()):
            self._reason = f"{self._stop.first_name}: stopping everything"
            self._console.line(f"{self._reason}; the same command resumes what was saved")
            return STOPPED_EARLY if self._stop.wants_save else self._stop.exit_code
        if self._stop.wants_save and self._save_until is None:
            limit = self._limits.save_timeout_s
            self._save_until = time.monotonic() + limit
            if self._meeting.node.is_leader:
                request_stop(self._run_dir, self._stop.first_name)
                self._console.line(
                    f"{self._stop.first_name}: saving a checkpoint, then stopping "
                    f"(run.save_timeout_s={limit:g})"
                )
            else:
                self._save_until += _LEADER_S  # the leader ends the run
        if self._save_until is not None and time.monotonic() > self._save_until:
            # Not 75: a scheduler that starts such a run again and again would never get anywhere.
            what = (
                f"DeadlineError: was asked to save and did not end inside run.save_timeout_s="
                f"{self._limits.save_timeout_s:g}; the last checkpoint stands"
            )
            return self._fail(Origin("trainer", "", what, "trainer"))
        return None

    def _has_nothing_to_save(self) -> bool:
        """An evaluation never has, a training not before it begins; the leader can tell."""
        if not self._limits.save_timeout_s:
            return True
        if self._save_until is not None or not self._meeting.node.is_leader:
            return False
        has_begun = trainer_has_begun(self._run_dir)
        # What was not ready when we looked last may have made a step since.
        return bool(self._waiting) if has_begun is None else not has_begun

    def _on_children(self) -> int | None:
        roles = {role.name: role for role in self._roles}
        ended = [child for child in self._children.values() if child.exit_code is not None]
        if any(child.exit_code == 0 and roles[child.name].ends_run for child in ended):
            self._view.update()
            return self._finished()
        bad = [
            child
            for child in ended
            # Once asked to save only the trainer matters: a scheduler's signal may end the others.
            if not (child.exit_code == 0 and roles[child.name].may_end)
            and (self._save_until is None or roles[child.name].is_needed_to_save)
        ]
        return self._on_bad_end(bad) if bad else None

    def _on_bad_end(self, ended: Sequence[Child]) -> int | None:
        """Have engines started anew, as far as their policy goes; what else ends, ends the run."""
        deaths: list[Death] = []
        for child in ended:
            was_ready = child.name not in self._waiting
            death = None
            if self._save_until is None:
                death = self._restarts.on_end(child, was_ready=was_ready)
            else:
                death = Death(child.name, child.exit_code or 0, time.time())
            if death is None or death.num_peers > 1:
                del self._children[child.name]
            if death is not None:
                deaths.append(death)
        return self._on_deaths(deaths)

    def _on_deaths(self, deaths: Sequence[Death]) -> int | None:
        """The run is over if one of `deaths` ends it; else it goes on without those engines."""
        if not deaths:
            return None
        self._lost += deaths
        if any(death.num_peers == 1 for death in deaths):
            return self._role_ended(deaths)
        for death in deaths:
            self._meeting.report_death(death)
        return self._role_ended(deaths) if self._fatal() else None

    def _fatal(self) -> list[Death]:
        """Deaths on all nodes that end the run, the earliest first."""
        known = {death.name: death for death in [*self._lost, *self._meeting.deaths()]}
        by_time = sorted(known.values(), key=lambda death: death.time)
        alone = [death for death in by_time if death.num_peers == 1]
        peers = [death for death in by_time if death.num_peers > 1]
        return alone or (peers if peers and len(peers) >= peers[0].num_peers else [])

    def _finished(self) -> int:
        """The role that ends the run has ended; an early end is not the run's end."""
        phases = {status.phase for status in read_status(self._run_dir)}
        if STOPPED_PHASE not in phases:
            return 0
        self._reason = "stopped early, after saving; the same command goes on"
        self._console.line(self._reason)
        return STOPPED_EARLY

    def _look(self) -> int | None:
        """Everything that is looked at less often: records, readiness, the other nodes."""
        if self._meeting.node.is_leader and self._has_lingering_failure():
            return self._role_ended([])
        if not self._probe():
            return self._fail(self._not_ready())
        if self._save_until is None and (code := self._look_at_engines()) is not None:
            return code
        self._view.update()
        reap_orphans(list(self._children.values()))
        return self._look_at_nodes()

    def _look_at_engines(self) -> int | None:
        """Kill what does not answer, and start anew what has ended."""
        ready = {name: child for name, child in self._children.items() if name not in self._waiting}
        self._restarts.look(ready)
        try:
            for child in self._restarts.start_due():
                self._children[child.name] = child
        except OSError as error:
            return self._fail(Origin("an engine", "restart", f"cannot be started: {error}", ""))
        return None

    def _look_at_nodes(self) -> int | None:
        if not self._meeting.node.is_leader:
            code = self._meeting.over()
            if code is not None:
                return code
        elif self._save_until is None and self._fatal():
            return self._role_ended([])
        elif gone := self._meeting.gone():
            name = self._meeting.name_of(gone.node)
            return self._fail(Origin(name, "", gone.reason, "", max(1, gone.exit_code)))
        if silence := self._meeting.silent():
            return self._fail(Origin(silence.split(" has ")[0], "", silence, ""))
        return None

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

    def _role_ended(self, deaths: Sequence[Death]) -> int:
        """A role has stopped or failed; give its peers a moment, then name the origin."""
        for death in deaths:
            self._meeting.report_death(death)
        if not self._meeting.node.is_leader:
            return self._leave_it_to_the_leader(deaths)
        settle = _SETTLE_S if self._meeting.node.count == 1 else _SETTLE_NODES_S
        deadline = time.monotonic() + settle
        while time.monotonic() < deadline and first_failure(self._run_dir) is None:
            time.sleep(_POLL_S)
        self._view.update()
        origin = find_origin(self._run_dir, self._fatal())
        assert origin is not None, "called because something failed"
        return self._fail(origin)

    def _leave_it_to_the_leader(self, deaths: Sequence[Death]) -> int:
        """The leader hears of the deaths and ends the run with the reason."""
        names = ", ".join(death.name for death in deaths)
        self._console.line(f"{names} ended; the reason is with {self._meeting.name_of(0)}")
        deadline = time.monotonic() + _LEADER_S
        while time.monotonic() < deadline and not self._stop.wants_stop:
            if (code := self._meeting.over()) is not None:
                return code
            self._meeting.silent()
            time.sleep(_LOOK_EVERY_S)
        origin = find_origin(self._run_dir, list(deaths))
        assert origin is not None, "called because something failed"
        return self._fail(origin)

    def _fail(self, origin: Origin) -> int:
        skip_bytes = self._restarts.log_offset(origin.log_name)
        if skip_bytes is None:
            skip_bytes = self._log_offsets.get(origin.log_name, 0)
        elapsed = format_duration(time.monotonic() - self._started_at)
        self._reason = f"{origin.name}: {origin.what}"
        with contextlib.suppress(OSError):  # a full disk is a failure to be told, too
            write_reason(self._run_dir, self._reason)
        self._console.line(
            f"the run failed after {elapsed}; stopping everything\n"
            + origin.report(self._log(origin.log_name) if origin.log_name else None, skip_bytes)
        )
        return origin.exit_code

    def _log(self, name: str) -> Path:
        return self._run_dir / "logs" / f"{name}.log"

    def _remember_logs(self) -> None:
        """Logs are appended to; what is there now belongs to earlier attempts."""
        for log in (self._run_dir / "logs").glob("*.log"):
            self._log_offsets[log.stem] = os.stat(log).st_size
