"""What Slurm and the run's folder say of a run's job, for `matpo status`."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from megatron_matpo.launch.slurm_task import BAD_NODES, FOLDER
from megatron_matpo.obs.files import write_atomic

_JOB_FILE = "job.json"
_DEADLINE_S = 5.0
_UNKNOWN = "state unknown"


def note_submission(run_dir: Path, job_id: str, max_restarts: int) -> None:
    """Leave the job's number in the run's folder, so that it can be looked at while it waits.

    The batch script writes the same file when it starts. Raises OSError.
    """
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    job = {"job_id": job_id, "nodes": "", "attempt": 0, "max_restarts": max_restarts}
    write_atomic(run_dir / FOLDER / _JOB_FILE, json.dumps(job))


def has_job(run_dir: Path) -> bool:
    """Whether a job of this run was submitted or has started."""
    return (run_dir / FOLDER / _JOB_FILE).is_file()


def queued_job(run_dir: Path) -> str:
    """As `job 12, RUNNING on n1`, if a job of this run waits or runs; else empty."""
    try:
        number = str(json.loads((run_dir / FOLDER / _JOB_FILE).read_text())["job_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    state = _ask_slurm(number)
    return f"job {number}, {state}" if state and not state.startswith(_UNKNOWN) else ""


def slurm_lines(run_dir: Path) -> list[str]:
    """State, nodes and attempts of the run's last Slurm job; empty if it had none."""
    try:
        job: dict[str, Any] = json.loads((run_dir / FOLDER / _JOB_FILE).read_text())
        number, nodes = str(job["job_id"]), str(job["nodes"])
        attempt, allowed = int(job["attempt"]), int(job["max_restarts"]) + 1
    except (OSError, ValueError, KeyError, TypeError):
        return []
    lines = [f"  slurm job {number}: {_ask_slurm(number) or _ended(nodes)}"]
    if attempt:
        lines.append(
            f"  attempt {attempt} of {allowed} without a newer checkpoint; "
            f"log {run_dir}/logs/slurm-{number}.log"
        )
    bad = sorted({*_lines(run_dir / FOLDER / BAD_NODES)})
    if bad:
        lines.append(f"  left out after a failed preflight: {', '.join(bad)}")
    return lines


def _ended(nodes: str) -> str:
    return f"ended (last on {nodes})" if nodes else "ended before it started"


def _ask_slurm(number: str) -> str:
    """As `RUNNING on n[1-2]`; empty for a job that Slurm no longer has."""
    if shutil.which("squeue") is None:
        return f"{_UNKNOWN} (no squeue here)"
    command = ["squeue", "--noheader", "--jobs", number, "--format", "%T|%N|%r"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return f"{_UNKNOWN} (squeue did not answer within {_DEADLINE_S:g} s)"
    if done.returncode != 0 or not done.stdout.strip():
        return ""
    state, nodes, reason = done.stdout.splitlines()[0].strip().split("|", 2)
    return f"{state} on {nodes}" if nodes else f"{state} ({reason})"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
