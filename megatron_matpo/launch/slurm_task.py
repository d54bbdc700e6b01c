"""The task of a Slurm job on each of its nodes: preflight, the run, a word on how it ended.

    python -m megatron_matpo.launch.slurm_task [--preflight] --run-dir FOLDER
        train RECIPE [key=value ...]

The batch script (`launch/batch.sh`) sees one exit code of all tasks, and the one of a task that was
stopped hides the one that failed. So each writes `RUN/slurm/exits/NODE`: `TIME CODE NODE REASON`.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from megatron_matpo.errors import MatpoError
from megatron_matpo.launch.eval import EvalRequest, evaluate
from megatron_matpo.launch.run import run
from megatron_matpo.launch.stopping import SIGNALS, STOPPED_EARLY, StoppedEarly, raise_on_signal
from megatron_matpo.obs.failure import first_failure, read_reason
from megatron_matpo.obs.files import write_atomic

FOLDER = "slurm"
EXITS = "exits"
BAD_NODES = "bad_nodes"
# The doctor's; 2 is a wrong configuration, 3 that another node or nobody is to blame.
_NODE_IS_BAD = 1
_MAX_REASON_CHARS = 2000


@dataclass(frozen=True)
class _Ending:
    code: int
    reason: str


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code of the run, or of the preflight if that failed."""
    options, rest = _parser().parse_known_args(arguments)
    options.overrides += rest  # those behind an option
    run_dir = Path(options.run_dir)
    model = [f"model.path={options.model}"] if options.model else []
    words = [options.recipe, *model, *options.overrides]
    raise_on_signal()
    try:
        ending = _preflight(run_dir, words) if options.preflight else _Ending(0, "")
        if ending.code == 0:
            ending = _run(run_dir, options)
    except StoppedEarly as stop:
        ending = _Ending(STOPPED_EARLY, f"{stop}: stopped before the run had begun")
        print(ending.reason, file=sys.stderr)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _record(run_dir, ending)
    return ending.code


def node_name() -> str:
    """This node as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slurm_task", description="A Slurm job's task on a node.")
    parser.add_argument("--preflight", action="store_true", help="`matpo doctor` first")
    parser.add_argument("--run-dir", required=True, help="the run's folder")
    parser.add_argument("command", choices=("train", "sft", "eval"))
    parser.add_argument("recipe")
    parser.add_argument("--model", default="", help="of `matpo eval`")
    parser.add_argument("overrides", nargs="*")
    return parser


def _preflight(run_dir: Path, words: list[str]) -> _Ending:
    """`matpo doctor`; a node on which it fails is written down, to be left out next time."""
    command = [sys.executable, "-m", "megatron_matpo", "doctor", "--preflight", *words]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        return _Ending(0, "")
    if code == _NODE_IS_BAD:
        bad = run_dir / FOLDER / BAD_NODES
        bad.parent.mkdir(parents=True, exist_ok=True)
        with bad.open("a", encoding="utf-8") as file:
            file.write(f"{node_name()}\n")
    return _Ending(code, f"matpo doctor --preflight: exit code {code}, see the lines above")


def _run(run_dir: Path, options: argparse.Namespace) -> _Ending:
    try:
        code = _started(options)
    except MatpoError as error:
        print(error, file=sys.stderr)
        return _Ending(error.exit_code, str(error))
    except Exception as error:
        traceback.print_exc()
        return _Ending(1, f"{type(error).__name__}: {error}")
    return _Ending(code, _reason(run_dir, code))


def _started(options: argparse.Namespace) -> int:
    recipe, overrides = options.recipe, options.overrides
    if options.command == "eval":
        return evaluate(EvalRequest(recipe, options.model, [], overrides=overrides))
    return run(options.command, recipe, overrides)


def _reason(run_dir: Path, code: int) -> str:
    """The first failure that the run recorded, if it failed."""
    if code == 0:
        return ""
    if code == STOPPED_EARLY:
        return "stopped early after saving"
    if reason := read_reason(run_dir):  # what the supervisor made of all that was recorded
        return reason
    failure = first_failure(run_dir)
    if failure is None:
        return f"exit code {code}, see the lines above"
    who = f"{failure.role}-{failure.rank}"
    return f"{who}, phase {failure.phase}: {failure.type}: {failure.message}"


def _record(run_dir: Path, ending: _Ending) -> None:
    reason = " ".join(ending.reason.split())[:_MAX_REASON_CHARS]
    line = f"{time.time():.3f} {ending.code} {node_name()} {reason}\n"
    try:
        folder = run_dir / FOLDER / EXITS
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / node_name(), line)
    except OSError as error:
        # The exit code is what counts.
        print(f"cannot write how this task ended: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
