"""Engines of a node that end, or do not answer, are started anew.

Invariants:

* only what was ready once is started anew: a start that fails ends the run, with its reason;
* nothing of the old process is left when the new one starts (ports, GPU memory);
* each restart waits longer than the one before, and their number is bounded;
* a request to restart is dropped while the engine is starting: it is about the one before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_matpo.launch.console import Console
from megatron_matpo.launch.origin import Death, describe_exit, last_lines
from megatron_matpo.launch.process import Child, kill_session
from megatron_matpo.launch.roles import RestartPolicy, RoleSpec
from megatron_matpo.obs.restart_request import take_restart_requests

_LOG_LINES = 5


@dataclass
class _Engine:
    """What is remembered of one role that can be started anew."""

    role: RoleSpec
    policy: RestartPolicy
    log: Path
    log_offset: int
    """The present start's part of the log begins here."""
    num_restarts: int = 0
    start_at: float | None = None
    """Monotonic time of the next start."""
    ready_until: float | None = None
    """Monotonic time until which the new start has to be ready; None: it is, or never began."""
    asked: str = ""
    """Why it was killed."""


class Restarts:
    """Keeps the engines of one node running. Used by the supervisor's thread."""

    def __init__(
        self,
        run_dir: Path,
        roles: Sequence[RoleSpec],
        console: Console,
        start: Callable[[RoleSpec], Child],
        start_timeout_s: float,
    ) -> None:
        """`start` starts a role, its log appended to `RUN/logs/NAME.log`."""
        self._run_dir, self._console = run_dir, console
        self._start, self._start_timeout_s = start, start_timeout_s
        self._engines: dict[str, _Engine] = {}
        for role in roles:
            if role.restarts is not None:
                log = run_dir / "logs" / f"{role.name}.log"
                self._engines[role.name] = _Engine(role, role.restarts, log, _size(log))

    def log_offset(self, name: str) -> int | None:
        """Where the log of the present start begins; None if `name` is not started anew."""
        engine = self._engines.get(name)
        return engine.log_offset if engine and engine.num_restarts else None

    def on_end(self, child: Child, *, was_ready: bool) -> Death | None:
        """Plan a new start of an ended child; returns its death if there will be none.

        A death with `num_peers > 1` ends the run only together with those of its peers.
        """
        engine = self._engines.get(child.name)
        death = Death(child.name, child.exit_code or 0, time.time())
        if engine is None or engine.policy.max_restarts == 0 or not was_ready:
            return death
        kill_session(child.process.pid)
        why = engine.asked or describe_exit(child.exit_code or 0)
        engine.asked, engine.ready_until = "", None
        lines = last_lines(engine.log, engine.log_offset, _LOG_LINES)
        tail = "".join(f"\n  | {line}" for line in lines)
        setting = f"rollout.max_engine_restarts={engine.policy.max_restarts}"
        if engine.num_restarts >= engine.policy.max_restarts:
            self._console.line(f"{child.name}: {why}; {setting} are used up{tail}")
            return Death(death.name, death.exit_code, death.time, engine.policy.num_peers)
        pause_s = engine.policy.pause_s(engine.num_restarts)
        engine.num_restarts += 1
        engine.start_at = time.monotonic() + pause_s
        self._console.line(
            f"{child.name}: {why}; starting it anew in {pause_s:g} s "
            f"(restart {engine.num_restarts}, {setting}){tail}"
        )
        return None

    def start_due(self) -> list[Child]:
        """Start what waited long enough.

        Raises:
            OSError: the program cannot be started.
        """
        started: list[Child] = []
        for engine in self._engines.values():
            if engine.start_at is None or time.monotonic() < engine.start_at:
                continue
            engine.start_at = None
            engine.log_offset = _size(engine.log)
            with engine.log.open("a") as log:
                log.write(f"=== {engine.role.name}: restart {engine.num_restarts}\n")
            started.append(self._start(engine.role))
            engine.ready_until = time.monotonic() + self._start_timeout_s
        return started

    def look(self, children: Mapping[str, Child]) -> None:
        """Ask new starts whether they are ready, and kill what does not answer.

        `children` are the running ones that were ready once; killed ones end as any other.
        """
        for name, why in take_restart_requests(self._run_dir, self._engines).items():
            engine, child = self._engines[name], children.get(name)
            if child is not None and child.exit_code is None and engine.ready_until is None:
                self._kill(engine, child, f"does not answer ({why})")
        for name, engine in self._engines.items():
            if engine.ready_until is None or (child := children.get(name)) is None:
                continue
            if engine.role.is_ready():
                took_s = self._start_timeout_s - (engine.ready_until - time.monotonic())
                engine.ready_until = None
                self._console.line(
                    f"{name} ready {took_s:.1f} s after restart {engine.num_restarts}"
                )
            elif time.monotonic() > engine.ready_until:
                limit = f"run.start_timeout_s={self._start_timeout_s:g}"
                self._kill(engine, child, f"not ready within {limit}")

    def _kill(self, engine: _Engine, child: Child, why: str) -> None:
        engine.asked = why
        self._console.line(f"{child.name}: {why}; killing it")
        kill_session(child.process.pid)


def _size(log: Path) -> int:
    return os.stat(log).st_size if log.exists() else 0
