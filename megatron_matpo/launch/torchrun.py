"""Forms the trainer: torchrun's Python API, one agent on each node that trains, no restarts.

A restart would have to come with engines in a known state, so that a failed rank ends the run; the
next `matpo train` resumes it from the last checkpoint. Exit codes of the ranks are left in
`status/trainer-exits-NODE.txt` as `RANK CODE TIME` lines, because the first rank to be killed by a
signal can write nothing itself while its peers report broken connections.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_matpo.config.load import load_resolved
from megatron_matpo.config.plan import Plan
from megatron_matpo.launch import rendezvous
from megatron_matpo.launch.run_folder import CONFIG_FILE, PLAN_FILE
from megatron_matpo.launch.torchrun_files import exits_file


def main() -> None:
    """Run `--entry` on every trainer rank; exit code 1 if any rank fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--entry", required=True)
    parser.add_argument("--node", required=True, type=int)
    arguments = parser.parse_args()
    run_dir: Path = arguments.run_dir
    config = load_resolved(str(run_dir / CONFIG_FILE))
    plan = Plan.from_json((run_dir / PLAN_FILE).read_text())
    if config.run.save_on_stop:
        # Inherited by the ranks. A scheduler's SIGTERM reaches every process of a job; the
        # supervisor asks for a save then, and stops the trainer with SIGINT if it has to.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if config.cluster.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"
    rendezvous.register()
    launch = LaunchConfig(
        min_nodes=plan.num_trainer_nodes,
        max_nodes=plan.num_trainer_nodes,
        nproc_per_node=plan.trainer_ranks_per_node[arguments.node],
        run_id=config.run.name,
        rdzv_backend=rendezvous.BACKEND,
        rdzv_endpoint=f"{plan.trainer_host}:{plan.trainer_port}",
        rdzv_configs={"rank": arguments.node, "timeout": config.run.start_timeout_s},
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(),
        signals_to_handle="SIGINT" if config.run.save_on_stop else "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
    )
    rank = ["-m", "megatron_matpo.launch.rank", "--run-dir", str(run_dir)]
    rank += ["--entry", arguments.entry, "--parent", str(os.getpid())]
    try:
        elastic_launch(launch, sys.executable)(*rank)
    except ChildFailedError as error:
        ordered = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        lines = [f"{index} {failed.exitcode} {failed.timestamp}\n" for index, failed in ordered]
        (run_dir / "status" / exits_file(arguments.node)).write_text("".join(lines))
        sys.exit(1)
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()
