"""Which process failed first, told from failure files, exit codes and logs.

When one process of a run ends, the others follow with broken connections. The origin is, in this
order: an engine or manager that ended on its own without a word; a trainer rank that a signal
ended; the earliest recorded failure (`obs.failure`); the process that was seen to end first.
"""

from __future__ import annotations

import contextlib
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from megatron_matpo.launch.torchrun_files import EXITS_FILES
from megatron_matpo.obs.failure import Failure, first_failure
from megatron_matpo.obs.status import read_status

LOG_LINES = 20
_TAIL_BYTES = 256 * 1024
# A recorded failure that is older than an engine's death by more than this came before it.
_EARLIER_S = 1.0

_NOISE = re.compile(
    r'"(GET|POST) [^"]*" 200|Prefill batch|Decode batch|FutureWarning|DeprecationWarning|'
    r"UserWarning|^\s*warnings\.warn|Loading safetensors|\d+%\|"
)


@dataclass(frozen=True)
class Death:
    """A role's process that ended although it should not have."""

    name: str
    """Name of the role instance, as in `engine-0`."""
    exit_code: int
    """-N if signal N ended it."""
    time: float
    """Unix time in seconds at which the supervisor saw it."""
    num_peers: int = 1
    """The run ends when so many of its kind have ended for good."""


@dataclass(frozen=True)
class Origin:
    """The first failure of a run, for people and for the exit code."""

    name: str
    phase: str
    what: str
    """Error type and message, or how the process ended."""
    log_name: str
    exit_code: int = 1

    def report(self, log: Path | None, skip_bytes: int) -> str:
        """A block of text with the last log lines; `skip_bytes` belong to earlier attempts."""
        where = f", phase {self.phase}" if self.phase else ""
        text = [f"first failure: {self.name}{where}", f"  {self.what}"]
        if log is None:
            return "\n".join(text)
        lines = last_lines(log, skip_bytes)
        if lines:
            text.append(f"last lines of {log}:")
            text += [f"  | {line}" for line in lines]
        else:
            text.append(f"its log is empty: {log}")
        return "\n".join(text)


def find_origin(run_dir: Path, deaths: list[Death]) -> Origin | None:
    """The first failure, or None if nothing has failed (see the module's rules)."""
    recorded = first_failure(run_dir)
    silent = [death for death in deaths if not death.name.startswith("trainer")]
    silent = [death for death in silent if not _speaks_for(recorded, death)]
    if silent and (recorded is None or recorded.time > silent[0].time - _EARLIER_S):
        return _from_death(run_dir, silent[0])
    exits = _rank_exits(run_dir)
    killed = [rank for rank, code in exits if code < 0 and code != -signal.SIGTERM]
    if killed and not (recorded and recorded.role == "trainer" and recorded.rank == killed[0]):
        return _from_rank(run_dir, killed[0], dict(exits)[killed[0]])
    if recorded is not None:
        return _from_record(recorded)
    failed = [rank for rank, code in exits if code > 0]
    if failed:
        return _from_rank(run_dir, failed[0], dict(exits)[failed[0]])
    return _from_death(run_dir, deaths[0]) if deaths else None


def last_lines(log: Path, skip_bytes: int = 0, count: int = LOG_LINES) -> list[str]:
    """The last lines of a log without those that are there in every healthy run."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(skip_bytes, size - _TAIL_BYTES) if size > skip_bytes else size)
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.splitlines()]
    return [line for line in lines if line and not _NOISE.search(line)][-count:]


def describe_exit(code: int) -> str:
    """`exit code 3`, or `ended by SIGKILL (...)`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (out of memory, or someone killed it)" if name == "SIGKILL" else ""
    return f"ended by {name}{hint}"


def _speaks_for(recorded: Failure | None, death: Death) -> bool:
    return recorded is not None and death.name in (
        recorded.role,
        f"{recorded.role}-{recorded.rank}",
    )


def _from_death(run_dir: Path, death: Death) -> Origin:
    what = f"the process stopped on its own: {describe_exit(death.exit_code)}"
    return Origin(death.name, _phase_of(run_dir, death.name), what, death.name)


def _phase_of(run_dir: Path, name: str) -> str:
    """What the role instance was doing when it wrote its status last; empty if it wrote none."""
    for status in read_status(run_dir):
        if name in (f"{status.role}-{status.rank}", status.role if status.rank == 0 else ""):
            return status.phase
    return ""


def _from_record(failure: Failure) -> Origin:
    is_single = failure.role in ("manager", "evaluation")
    name = failure.role if is_single else f"{failure.role}-{failure.rank}"
    what = f"{failure.type}: {failure.message}".replace("\n", "\n  ")
    code = 2 if failure.exit_code == 2 else 1
    return Origin(name, failure.phase, what, name, code)


def _rank_exits(run_dir: Path) -> list[tuple[int, int]]:
    """(rank, exit code) of failed trainer ranks, the earliest first; -N for signal N."""
    found: list[tuple[float, int, int]] = []
    for path in (run_dir / "status").glob(EXITS_FILES):
        with contextlib.suppress(OSError):
            lines = (line.split() for line in path.read_text().splitlines())
            found += [(float(time), int(rank), int(code)) for rank, code, time in lines]
    return [(rank, code) for _, rank, code in sorted(found)]


def _from_rank(run_dir: Path, rank: int, code: int) -> Origin:
    return _from_death(run_dir, Death(f"trainer-{rank}", code, 0.0))
