"""`RUN/status/ROLE-RANK.json`: what each process of a run is doing right now.

Written by the processes, read by the supervisor (and by people, when a run seems to hang).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_matpo.obs.files import write_atomic

FOLDER = "status"
FAILURE_PREFIX = "failure-"


@dataclass(frozen=True, slots=True)
class RoleStatus:
    """One process of the run as it described itself last."""

    role: str
    rank: int
    phase: str
    step: int
    """-1 outside of steps."""
    pid: int
    started_at: float
    """Unix time in seconds at which the process made its `PhaseWriter`."""
    updated_at: float
    """Unix time in seconds of the last `set`."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Whatever else was passed to `set`."""


class PhaseWriter:
    """Tells the supervisor what this process does; cheap enough for every phase of a step."""

    def __init__(self, run_dir: str | Path, role: str, rank: int) -> None:
        """Nothing is written before the first `set`."""
        self.path = Path(run_dir) / FOLDER / f"{role}-{rank}.json"
        self._identity = {"role": role, "rank": rank, "pid": os.getpid(), "started_at": time.time()}

    def set(self, phase: str, step: int = -1, **fields: Any) -> None:
        """Replace the file. `fields` must be small and JSON can hold them."""
        status = {
            **self._identity,
            "phase": phase,
            "step": step,
            "updated_at": time.time(),
            "fields": fields,
        }
        write_atomic(self.path, json.dumps(status), durable=False)


def read_status(run_dir: str | Path) -> list[RoleStatus]:
    """All roles that have written, sorted by role and rank; damaged files are left out."""
    found: list[RoleStatus] = []
    for path in (Path(run_dir) / FOLDER).glob("*.json"):
        if path.name.startswith((FAILURE_PREFIX, ".")):
            continue
        try:
            found.append(RoleStatus(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue  # another version's file, or removed while we looked
    return sorted(found, key=lambda status: (status.role, status.rank))


def clear_status(run_dir: str | Path) -> None:
    """Remove what an earlier attempt of the same run left, so that it is not taken for ours."""
    for path in (Path(run_dir) / FOLDER).glob("*.json"):
        if not path.name.startswith(FAILURE_PREFIX):
            path.unlink(missing_ok=True)
