"""`RUN/status/restart-ROLE`: the manager asks for a new start of an engine that does not answer.

Read, and removed, by the supervisor of the node that owns the engine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_matpo.obs.files import write_atomic
from megatron_matpo.obs.status import FOLDER

_PREFIX = "restart-"


def request_restart(run_dir: Path, name: str, why: str) -> None:
    """Ask for a new start of the role instance `name`, as in `engine-0`; `why` is for people."""
    write_atomic(run_dir / FOLDER / f"{_PREFIX}{name}", why, durable=False)


def take_restart_requests(run_dir: Path, names: Iterable[str]) -> dict[str, str]:
    """Requests for `names` with their reasons; each is handed out once."""
    wanted = {f"{_PREFIX}{name}": name for name in names}
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        # Listing makes a network file system look again (see `launch.meeting`).
        for file in wanted.keys() & set(os.listdir(run_dir / FOLDER)):
            path = run_dir / FOLDER / file
            with contextlib.suppress(OSError):
                found[wanted[file]] = path.read_text()
                path.unlink()
    return found


def clear_restart_requests(run_dir: Path) -> None:
    """Forget what an earlier attempt was asked."""
    for path in (run_dir / FOLDER).glob(f"{_PREFIX}*"):
        path.unlink(missing_ok=True)
