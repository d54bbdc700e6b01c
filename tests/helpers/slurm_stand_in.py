"""Stands in for the run in a Slurm task: `slurm_task` with a run and a doctor of its own.

Called as `slurm_stand_in.py -m megatron_matpo.launch.slurm_task ARGUMENTS`. The file that
`MATPO_STAND_IN` names has a line per attempt (the last one is repeated) with words of the form
`NODE=ACTION`; a word without `NODE=` is for every node. Actions: `exit:CODE`, `fail:CODE:TEXT`
(with a failure of the trainer recorded), `save:STEP` (a checkpoint), `wait` (until SIGTERM; then
goes on), `bad` (the preflight fails).
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

from megatron_matpo.launch import slurm_task
from megatron_matpo.obs.failure import record_failure


def actions() -> list[str]:
    lines = Path(os.environ["MATPO_STAND_IN"]).read_text().splitlines()
    words = lines[min(int(os.environ.get("SLURM_RESTART_COUNT", "0")), len(lines) - 1)].split()
    parts = [word.rpartition("=") for word in words]
    return [action for node, _, action in parts if node in ("", slurm_task.node_name())]


def run_dir() -> Path:
    return Path(sys.argv[sys.argv.index("--run-dir") + 1])


def stand_in_run(command: str, recipe: str, overrides: list[str]) -> int:
    print(f"stand-in: {command} {recipe} {' '.join(overrides)}", flush=True)
    for action in actions():
        kind, *rest = action.split(":")
        if kind == "exit":
            return int(rest[0])
        if kind == "fail":
            error = RuntimeError(rest[1].replace("_", " "))
            record_failure(run_dir(), "trainer", 0, "learn", error, traceback.format_exc())
            return int(rest[0])
        if kind == "save":
            folder = run_dir() / "checkpoints"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "latest").write_text(f"step_{rest[0]}\n")
        if kind == "wait":
            signal.sigwait({signal.SIGTERM})
    return 0


class StandInDoctor:
    """What `subprocess.run` is for the preflight."""

    @staticmethod
    def run(command: list[str], check: bool) -> StandInDoctor:
        assert "--preflight" in command
        return StandInDoctor()

    @property
    def returncode(self) -> int:
        return 1 if "bad" in actions() else 0


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    slurm_task.run = stand_in_run
    slurm_task.subprocess = StandInDoctor
    sys.exit(slurm_task.main(sys.argv[3:]))
