"""`RUN/status/stop-request`: the supervisor asks the trainer to save and end."""

from __future__ import annotations

from pathlib import Path

from megatron_matpo.obs.files import write_atomic
from megatron_matpo.obs.status import FOLDER

_FILE = "stop-request"
STOPPED_PHASE = "stopped"
"""Phase of a trainer rank that ended early, after saving, because it was asked to."""


def request_stop(run_dir: Path, why: str) -> None:
    """Ask; `why` is for people."""
    write_atomic(run_dir / FOLDER / _FILE, why, durable=False)


def is_stop_requested(run_dir: Path) -> bool:
    """Cheap enough to be asked several times a second."""
    return (run_dir / FOLDER / _FILE).exists()


def clear_stop_request(run_dir: Path) -> None:
    """Forget what an earlier attempt was asked."""
    (run_dir / FOLDER / _FILE).unlink(missing_ok=True)
