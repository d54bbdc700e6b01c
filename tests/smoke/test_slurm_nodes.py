"""The quickstart on a real Slurm of two nodes: trainer on one, engine on the other.

Both ways of submitting; an engine that is killed, a requeue, a node that dies. Each time the job
goes on by itself and finishes. Not proved here: containers, GPUs, addresses of more than loopback.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_matpo.wire import recording_path
from tests.helpers.matpo import (
    QUICKSTART,
    ROOT,
    matpo_command,
    processes_of,
    read_metrics,
    wait_for_step,
    wait_until_gone,
)
from tests.helpers.slurm import LocalSlurm, why_not
from tests.smoke.conftest import BATCH, STEPS

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]
NODES = ("cluster.num_nodes=2", "cluster.interface=lo", "checkpoint.every=1")
LONG = (*NODES, *BATCH, "run.steps=10")


@pytest.fixture(scope="module")
def slurm():
    with LocalSlurm(nodes=2) as running:
        yield running


def cluster_file(folder: Path, **slurm: object) -> str:
    cluster = {
        "run_dir": str(folder / "runs"),
        "env": {"OMP_NUM_THREADS": 1, "PYTHONPATH": str(ROOT)},
        "bare": {"repository": str(ROOT), "python": sys.executable},
        "slurm": {"exclusive": False, "memory": "1000", **slurm},
    }
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster))
    return str(path)


def job_log(run: Path, job: str, slurm: LocalSlurm) -> str:
    path = run / "logs" / f"slurm-{job}.log"
    return path.read_text() if path.exists() else f"no {path}\n{slurm.logs()}"


def wait_for_checkpoint(run: Path, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not (run / "checkpoints" / "latest").exists():
        assert time.monotonic() < end, f"no checkpoint within {timeout_s} s"
        time.sleep(0.05)


def engine_on(run: Path, node: str) -> int:
    """The process of the run's engine; its helpers have later numbers."""
    pids = [int(line.split(":")[0]) for line in processes_of(run) if "serve.py" in line]
    return min(pid for pid in pids if psutil.Process(pid).environ()["SLURMD_NODENAME"] == node)


def steps_of(run: Path) -> list[float]:
    return [line["step"] for line in read_metrics(run)]


def test_launched_with_an_engine_that_is_killed(slurm, tmp_path):
    run = tmp_path / "runs" / "quickstart"
    arguments = (QUICKSTART, "--cluster", cluster_file(tmp_path, max_restarts=1), *LONG)
    arguments += ("rollout.max_engine_restarts=0",)  # the engine's end is the run's
    done = subprocess.run(
        matpo_command("launch", *arguments),
        cwd=ROOT,
        env={**slurm.env, "NEMORUN_HOME": str(tmp_path / "nemo")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    job = done.stdout.split("submitted job ")[1].split(":")[0]
    wait_for_step(run, 1, timeout_s=300)
    plan = json.loads((run / "plan.json").read_text())
    assert plan["trainer_ranks_per_node"] == [2, 0]
    assert [place["node"] for place in plan["engines"]] == [1]
    wait_for_checkpoint(run, timeout_s=60)
    engine = engine_on(run, "n2")
    os.kill(engine, signal.SIGKILL)
    state = slurm.wait(job, timeout_s=300)
    log = job_log(run, job, slurm)
    assert state == "COMPLETED", log
    assert log.count("first failure: engine-0") == 1, log
    assert re.search(r"reason: n\d: engine-0: the process stopped .* ended by SIGKILL", log), log
    assert "trying again from checkpoint step_" in log
    assert steps_of(run) == list(range(1, 11))
    assert wait_until_gone(run) == []


def test_a_batch_script_that_is_requeued(slurm, tmp_path):
    run = tmp_path / "quickstart"
    job = slurm.sbatch(
        *("--nodes=2", "--mem=1000", "--oversubscribe", "slurm/quickstart.sbatch"),
        *(f"run.dir={tmp_path}", *LONG),
        cwd=ROOT,
    )
    wait_for_checkpoint(run, timeout_s=300)
    slurm.requeue(job)
    state = slurm.wait(job, timeout_s=400)
    log = job_log(run, job, slurm)
    assert state == "COMPLETED", log
    assert int(slurm.job(job)["Restarts"]) == 1
    assert "resuming" in log
    assert steps_of(run) == list(range(1, 11))
    assert wait_until_gone(run) == []


def test_a_node_that_dies_in_the_middle(slurm, live_run, tmp_path):
    steps, recordings = 60, tmp_path / "recordings"
    recordings.mkdir()
    for step in range(1, steps + 1):
        source = recording_path(live_run / "rollouts", (step - 1) % STEPS + 1)
        recording_path(recordings, step).symlink_to(source)
    run = tmp_path / "quickstart"
    job = slurm.sbatch(
        *("--nodes=2", "--mem=1000", "--oversubscribe", "slurm/quickstart.sbatch"),
        *(f"run.dir={tmp_path}", *NODES, "cluster.trainer_nodes=2", f"run.steps={steps}"),
        f"rollout.replay={recordings}",
        cwd=ROOT,
    )
    # Checkpoints are written beside the steps: there need not be one after the first.
    wait_for_checkpoint(run, timeout_s=300)
    slurm.stop_node("n2")
    slurm.wait_for(job, {"PENDING", "CONFIGURING"}, timeout_s=120)
    time.sleep(1)
    slurm.start_node("n2")
    state = slurm.wait(job, timeout_s=400)
    log = job_log(run, job, slurm)
    assert state == "COMPLETED", log
    assert "resuming" in log, log
    assert steps_of(run) == list(range(1, steps + 1))
    assert wait_until_gone(run) == []
