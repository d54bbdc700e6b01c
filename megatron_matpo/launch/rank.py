"""Start of one trainer rank: its log file first, then the entry module.

Importing torch and Megatron takes seconds and can fail; from here on that, too, lands in
`logs/trainer-RANK.log` and not in the launcher's output.
"""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

from megatron_matpo.launch.process import die_with_parent
from megatron_matpo.obs.failure import record_failure


def main() -> None:
    """Redirect output and run `--entry` as `__main__` with `--run-dir`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--entry", required=True)
    parser.add_argument("--parent", required=True, type=int)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent, signal.SIGKILL)  # SIGTERM may be ignored
    rank = int(os.environ["RANK"])
    log = arguments.run_dir / "logs" / f"trainer-{rank}.log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.argv = [arguments.entry, "--run-dir", str(arguments.run_dir)]
    try:
        runpy.run_module(arguments.entry, run_name="__main__", alter_sys=True)
    except Exception as error:
        text = traceback.format_exc()
        record_failure(arguments.run_dir, "trainer", rank, "start", error, text)
        raise


if __name__ == "__main__":
    main()
