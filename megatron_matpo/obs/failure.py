"""`RUN/status/failure-ROLE-RANK.json`: why a process of the run gave up.

When one process fails, its peers fail too, with resets and broken process groups. `first_failure`
names the cause: the earliest failure that does not look like such a consequence.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_matpo.errors import MatpoError
from megatron_matpo.obs.files import write_atomic
from megatron_matpo.obs.status import FAILURE_PREFIX, FOLDER

MAX_TEXT_CHARS = 20_000
_REASON = "reason"

_CONSEQUENCE_TYPES = frozenset(
    {
        "EngineUnreachable",
        "ConnectionResetError",
        "ConnectionRefusedError",
        "ConnectionAbortedError",
        "BrokenPipeError",
        "DistBackendError",
        "DistNetworkError",
        "CancelledError",
        "KeyboardInterrupt",
        "SystemExit",
        "ServerDisconnectedError",
    }
)
_CONSEQUENCE_TEXT = re.compile(
    r"connection (was )?(reset|closed|refused|aborted)( by peer)?|broken pipe|peer closed|"
    r"socket (timeout|closed)|gloo.{0,200}(connect|timed out|closed)|nccl.{0,40}(remote|aborted)|"
    r"process group.{0,80}(abort|broken|destroyed|terminated)|"
    r"(tcpstore|store).{0,80}(closed|unreachable|failed to (recv|send))|"
    r"(killed|terminated|stopped) (by|on) (signal )?(SIGTERM|15\b)",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Failure:
    """One recorded failure."""

    role: str
    rank: int
    phase: str
    time: float
    """Unix time in seconds."""
    type: str
    """Class name of the error."""
    message: str
    exit_code: int
    traceback: str

    @property
    def is_consequence(self) -> bool:
        """It looks like the echo of another process's failure."""
        return self.type in _CONSEQUENCE_TYPES or bool(_CONSEQUENCE_TEXT.search(self.message))


def record_failure(
    run_dir: str | Path,
    role: str,
    rank: int,
    phase: str,
    error: BaseException,
    traceback_text: str,
) -> None:
    """Write the failure file. The first one of a role and rank stays: later ones follow from it."""
    path = Path(run_dir) / FOLDER / f"{FAILURE_PREFIX}{role}-{rank}.json"
    if path.exists():
        return
    failure = Failure(
        role=role,
        rank=rank,
        phase=phase,
        time=time.time(),
        type=type(error).__name__,
        message=str(error)[:MAX_TEXT_CHARS],
        exit_code=error.exit_code if isinstance(error, MatpoError) else 1,
        traceback=traceback_text[-MAX_TEXT_CHARS:],
    )
    write_atomic(path, json.dumps(asdict(failure)))


def all_failures(run_dir: str | Path) -> list[Failure]:
    """All recorded failures, earliest first."""
    found: list[Failure] = []
    for path in (Path(run_dir) / FOLDER).glob(f"{FAILURE_PREFIX}*.json"):
        try:
            found.append(Failure(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda failure: (failure.time, failure.role, failure.rank))


def first_failure(run_dir: str | Path) -> Failure | None:
    """The earliest primary failure, else the earliest of all, else None."""
    failures = all_failures(run_dir)
    primary = [failure for failure in failures if not failure.is_consequence]
    return (primary or failures or [None])[0]


def write_reason(run_dir: str | Path, reason: str) -> None:
    """Keep what a supervisor found to be the first failure, which need not have recorded itself."""
    write_atomic(Path(run_dir) / FOLDER / _REASON, reason, durable=False)


def read_reason(run_dir: str | Path) -> str:
    """What `write_reason` kept; empty if nothing failed."""
    try:
        return (Path(run_dir) / FOLDER / _REASON).read_text()
    except OSError:
        return ""


def clear(run_dir: str | Path) -> None:
    """Remove the failure files of an earlier attempt."""
    (Path(run_dir) / FOLDER / _REASON).unlink(missing_ok=True)
    for path in (Path(run_dir) / FOLDER).glob(f"{FAILURE_PREFIX}*.json"):
        path.unlink(missing_ok=True)
