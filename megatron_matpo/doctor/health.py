"""The container's health check: `python -m megatron_matpo.doctor.health RUNS [--silent-s N]`.

Unhealthy (exit code 1): a run of the folder that is going on has a process that failed, or has
written nothing for so long. Deadlines inside the run end it anyway; this is for whoever watches
containers. No run that is going on is healthy: the image also plans, exports and evaluates.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from megatron_matpo.launch.run_folder import CONFIG_FILE, is_in_use
from megatron_matpo.obs.failure import first_failure

_SILENT_S = 1800.0
"""Longer than any phase of a step that writes neither log, status nor metrics should take."""
_WATCHED = ("logs", "status", "rollouts")


def problems(runs: Path, silent_s: float, now: float) -> list[str]:
    """What is wrong with the runs that are going on, a line each."""
    found: list[str] = []
    for config in sorted(runs.glob(f"*/{CONFIG_FILE}")):
        run = config.parent
        if not is_in_use(run):
            continue
        failure = first_failure(run)
        if failure is not None:
            found.append(f"{run}: {failure.role}-{failure.rank} failed: {failure.message}")
        elif (silence := now - _last_written(run)) > silent_s:
            found.append(f"{run}: nothing was written for {silence:.0f} s")
    return found


def _last_written(run: Path) -> float:
    files = [*run.iterdir(), *(file for name in _WATCHED for file in (run / name).glob("*"))]
    times = [_modified(file) for file in files]
    return max(times, default=0.0)


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # replaced meanwhile
        return 0.0


def main() -> int:
    """Entry."""
    parser = argparse.ArgumentParser(prog="python -m megatron_matpo.doctor.health")
    parser.add_argument("runs", type=Path, help="folder of run folders")
    parser.add_argument("--silent-s", type=float, default=_SILENT_S, metavar="N")
    options = parser.parse_args()
    found = problems(options.runs, options.silent_s, time.time())
    print("\n".join(found) or "healthy")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
