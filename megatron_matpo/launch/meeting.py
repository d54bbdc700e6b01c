"""How the nodes of a run meet, and how they tell each other what becomes of it.

Everything passes through `RUN/nodes/LAUNCH_ID/`, on the file system that the nodes share anyway:

| file           | written by        | holds                                                  |
|----------------|-------------------|--------------------------------------------------------|
| `offer-N.json` | node N            | its address and free ports                             |
| `start.json`   | leader, mode 0600 | that the plan is written, and the run's secrets        |
| `beat-N`       | node N            | a number that grows, 12 times in `node_timeout_s`      |
| `death-R.json` | node of role R    | a role that ended although it should not have          |
| `gone-N.json`  | node N            | its exit code and reason, when it leaves               |
| `over.json`    | leader            | the same of the leader: the other nodes stop           |

A lone node has nobody to meet: the same calls then touch no file.

Network file systems remember for up to a minute that a file is not there. Listing its folder makes
them look again, so that no file of another node is asked for by name alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from megatron_matpo.config.plan import LEADER, Offer
from megatron_matpo.errors import ConfigError, DeadlineError, MatpoError
from megatron_matpo.launch.nodes import Node
from megatron_matpo.launch.origin import Death
from megatron_matpo.launch.run_secrets import RunSecrets
from megatron_matpo.obs.files import write_atomic

FOLDER = "nodes"
_POLL_S = 0.2
_BEATS_PER_TIMEOUT = 12
_START = "start.json"
_OVER = "over.json"

T = TypeVar("T")


@dataclass(frozen=True)
class Gone:
    """A node that left before the run was over."""

    node: int
    name: str
    exit_code: int
    reason: str


class Meeting:
    """This node's side. Used by one thread."""

    def __init__(self, run_dir: Path, node: Node, *, node_timeout_s: float) -> None:
        """Make the folder of this start; with one node there is none."""
        self.node = node
        self._folder = run_dir / FOLDER / node.launch_id
        self._node_timeout_s = node_timeout_s
        self._names = {node.index: node.name}
        self._beats: dict[int, tuple[str, float]] = {}
        self._beat, self._next_beat = 0, 0.0
        if self._is_alone:
            return
        self._folder.mkdir(parents=True, exist_ok=True)

    def forget_earlier(self) -> None:
        """Leader, once the run's folder is its own: remove what earlier starts have left."""
        if self._is_alone:
            return
        for other in self._folder.parent.iterdir():
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)

    @property
    def _is_alone(self) -> bool:
        return self.node.count == 1

    def gather(self, own: Offer, timeout_s: float) -> list[Offer]:
        """Leader: the offers of all nodes, in order.

        Raises:
            DeadlineError: a node did not come inside `timeout_s` (`run.start_timeout_s`).
            MatpoError: a node came and left; the message is its own.
        """
        self.offer(own)
        offers: dict[int, Offer] = {LEADER: own}

        def complete() -> list[Offer] | None:
            there = self._there()
            for index in set(range(self.node.count)) - set(offers):
                if found := self._read(f"offer-{index}.json", there):
                    self._names[index] = found["name"]
                    offers[index] = Offer(found["host"], tuple(found["ports"]))
            return [offers[i] for i in sorted(offers)] if len(offers) == self.node.count else None

        def missing() -> str:
            lacking = [str(index) for index in range(self.node.count) if index not in offers]
            return f"node {', '.join(lacking)} of {self.node.count} did not come"

        return self._wait(complete, timeout_s, missing)

    def offer(self, own: Offer) -> None:
        """Say what this node brings."""
        self._write(f"offer-{self.node.index}.json", {"name": self.node.name, **asdict(own)})

    def begin(self, own: RunSecrets) -> None:
        """Leader: the plan is in its place; the others may start."""
        self._write(_START, asdict(own), mode=0o600)

    def wait_for_start(self, timeout_s: float) -> RunSecrets | None:
        """Not the leader: return when the plan is there; None if there was nothing to do.

        Raises:
            DeadlineError: not inside `timeout_s` (`run.start_timeout_s`).
            MatpoError: the leader gave up; the message is its own.
        """

        def begun() -> dict | None:
            return {} if self.over() == 0 else self._read(_START)

        found = self._wait(begun, timeout_s, lambda: "node 0 did not write the plan")
        return RunSecrets(**found) if found else None

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """An error that is raised inside is told to the other nodes, which wait for this one."""
        try:
            yield
        except MatpoError as error:
            self.leave(error.exit_code, str(error))
            raise

    def report_death(self, death: Death) -> None:
        """Tell all nodes that a role of this one has ended."""
        with contextlib.suppress(OSError):  # a full disk may be what the role has died of
            self._write(f"death-{death.name}.json", asdict(death))

    def deaths(self) -> list[Death]:
        """Roles that ended on any node, the earliest first."""
        if self._is_alone:
            return []
        there = self._there()
        found = [self._read(name, there) for name in there if name.startswith("death-")]
        return sorted((Death(**item) for item in found if item), key=lambda death: death.time)

    def leave(self, exit_code: int, reason: str) -> None:
        """This node stops. The leader's word ends the run for all of them.

        The secrets are removed with the leader's leave.
        """
        if self._is_alone:
            return
        word = asdict(Gone(self.node.index, self.node.name, exit_code, reason))
        with contextlib.suppress(OSError):  # a full disk is no reason to hang; beats stop anyway
            if self.node.is_leader:
                (self._folder / _START).unlink(missing_ok=True)
            self._write(_OVER if self.node.is_leader else f"gone-{self.node.index}.json", word)

    def over(self) -> int | None:
        """The exit code that the leader gave the run, or None while it goes on."""
        found = self._read(_OVER)
        return None if found is None else int(found["exit_code"])

    def gone(self) -> Gone | None:
        """The first other node, by number, that has left; to the others only the leader counts."""
        there = self._there()
        for index in self._others():
            name = _OVER if index == LEADER else f"gone-{index}.json"
            if found := self._read(name, there):
                self._names[index] = found["name"]
                return Gone(**found)
        return None

    def silent(self) -> str | None:
        """Beat, and name a node whose beat has not changed for `cluster.node_timeout_s`."""
        if self._is_alone or time.monotonic() < self._next_beat:
            return None
        now = time.monotonic()
        self._beat, self._next_beat = (
            self._beat + 1,
            now + self._node_timeout_s / _BEATS_PER_TIMEOUT,
        )
        with contextlib.suppress(OSError):  # the others miss it if that lasts
            self._folder.joinpath(f"beat-{self.node.index}").write_text(str(self._beat))
        self._there()
        for index in self._others():
            with contextlib.suppress(OSError):
                beat = (self._folder / f"beat-{index}").read_text()
                if beat != self._beats.get(index, ("", 0.0))[0]:
                    self._beats[index] = (beat, now)
            # Its own clock starts with our first look: it may still be reading the recipe.
            _, seen = self._beats.setdefault(index, ("", now))
            if now - seen > self._node_timeout_s:
                return (
                    f"{self.name_of(index)} has not been heard of for {now - seen:.0f} s "
                    f"(cluster.node_timeout_s={self._node_timeout_s:g})"
                )
        return None

    def name_of(self, index: int) -> str:
        """`node 3 (host)`, as far as it is known here."""
        known = self._names.get(index, "")
        if not known and (found := self._read(f"offer-{index}.json")):
            known = self._names[index] = found["name"]
        return f"node {index} ({known})" if known else f"node {index}"

    def _others(self) -> list[int]:
        """Nodes to look at: the leader looks at all, the others at the leader."""
        if self._is_alone:
            return []
        return list(range(1, self.node.count)) if self.node.is_leader else [LEADER]

    def _wait(self, ask: Callable[[], T | None], timeout_s: float, what: Callable[[], str]) -> T:
        end = time.monotonic() + timeout_s
        while True:
            found, gone = ask(), self.gone()
            if gone and gone.exit_code != 0:
                error = ConfigError if gone.exit_code == ConfigError.exit_code else MatpoError
                raise error(f"{self.name_of(gone.node)}: {gone.reason}")
            if found is not None:
                return found
            if time.monotonic() > end:
                raise DeadlineError(f"{what()} inside run.start_timeout_s={timeout_s:g}")
            time.sleep(_POLL_S)

    def _write(self, name: str, content: object, mode: int = 0o666) -> None:
        if not self._is_alone:
            write_atomic(self._folder / name, json.dumps(content), mode=mode)

    def _there(self) -> set[str]:
        """Names of the files that are there now."""
        try:
            return set(os.listdir(self._folder))
        except OSError:
            return set()

    def _read(self, name: str, there: set[str] | None = None) -> dict | None:
        """A file's content; None if it is not there yet, or not readable at this moment.

        `there`: what `_there` has just said.
        """
        if self._is_alone or name not in (self._there() if there is None else there):
            return None
        try:
            return json.loads((self._folder / name).read_text())
        except (OSError, ValueError):
            return None
