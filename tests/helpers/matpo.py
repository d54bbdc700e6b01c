"""Runs the command line as a user does, and finds processes that a run left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


def matpo_command(*arguments: str) -> list[str]:
    """The command line as an argument list."""
    return [sys.executable, "-m", "megatron_matpo", *arguments]


def run_matpo(*arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run to the end; stdout and stderr together in `stdout`."""
    return subprocess.run(
        matpo_command(*arguments),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def start_matpo(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Start in the background; output goes to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(matpo_command(*arguments), cwd=ROOT, stdout=file, stderr=file)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(
    run_dir: Path, step: int, timeout_s: float, process: subprocess.Popen[bytes] | None = None
) -> None:
    """Return when `step` is in the metrics; `process` must run until then."""
    end = time.monotonic() + timeout_s
    while not any(line["step"] >= step for line in read_metrics(run_dir)):
        assert process is None or process.poll() is None, f"ended before step {step}"
        assert time.monotonic() < end, f"step {step} did not come within {timeout_s} s"
        time.sleep(0.1)


def processes_of(run_dir: Path) -> list[str]:
    """Command lines of living processes that work for the run.

    Processes are known by the run's folder or its model in the arguments, or as descendants that
    hold a file of the run's logs open.
    """
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            files = {file.path for file in process.open_files()}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        mine = str(run_dir) in command or any(path.startswith(str(run_dir)) for path in files)
        if mine and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
            found.append(f"{process.pid}: {command}")
    return found


def wait_until_gone(run_dir: Path, timeout_s: float = 20) -> list[str]:
    """Processes of the run that are still there after at most `timeout_s`."""
    end = time.monotonic() + timeout_s
    while (left := processes_of(run_dir)) and time.monotonic() < end:
        time.sleep(0.2)
    return left
