"""A real Slurm of two nodes on this machine takes jobs from `matpo launch` and from written files.

Proves: both ways train a small model to the end; what exit codes, signals, bad nodes and cancelling
lead to (with a stand-in for the run, so that each takes seconds); the reason of a failure is in the
job's log; a secret is in no file. Not proved here: containers, SSH, several nodes of one run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers.matpo import QUICKSTART, ROOT, matpo_command, read_metrics
from tests.helpers.slurm import LocalSlurm, why_not

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]
SECRET = "sk-planted-0123456789"
STAND_IN = ROOT / "tests" / "helpers" / "slurm_stand_in.py"


@pytest.fixture(scope="module")
def slurm():
    with LocalSlurm(nodes=2) as running:
        yield running


class Site:
    """A cluster file, a run folder and NeMo-Run's home in one folder."""

    def __init__(self, slurm: LocalSlurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.run = folder / "runs" / "quickstart"

    def cluster(self, plays: str = "", **slurm) -> str:
        """The cluster file; `plays` are the stand-in's lines, without which the real run starts."""
        python = self.folder / "python"
        start = f"{sys.executable} {STAND_IN}" if plays else sys.executable
        python.write_text(f'#!/bin/sh\nexec {start} "$@"\n')
        python.chmod(0o755)
        (self.folder / "plays").write_text(plays)
        cluster = {
            "run_dir": str(self.folder / "runs"),
            "env": {"MATPO_STAND_IN": str(self.folder / "plays"), "OMP_NUM_THREADS": 1},
            "bare": {"repository": str(ROOT), "python": str(python)},
            "slurm": {"exclusive": False, "memory": "100", "max_restarts": 1, **slurm},
            "secret_env": ["SERPER_API_KEY"],
            "preflight": bool(plays),
        }
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(cluster))
        return str(path)

    def matpo(self, *arguments: str) -> str:
        own = {
            "NEMORUN_HOME": str(self.folder / "nemo"),
            "SERPER_API_KEY": SECRET,
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            matpo_command("launch", *arguments),
            cwd=ROOT,
            env={**self.slurm.env, **own},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, plays: str, *options: str, **slurm) -> str:
        """Write the batch script of the stand-in and submit it."""
        script = str(self.folder / "job.sbatch")
        self.matpo(QUICKSTART, "--cluster", self.cluster(plays, **slurm), "--write", script)
        env = {"SERPER_API_KEY": SECRET, "PYTHONPATH": str(ROOT)}
        return self.slurm.sbatch(*options, script, cwd=self.folder, env=env)

    def log(self, job: str) -> str:
        path = self.run / "logs" / f"slurm-{job}.log"
        return path.read_text() if path.exists() else f"no {path}\n{self.slurm.logs()}"

    def finish(self, job: str, timeout_s: float = 90) -> tuple[str, int, str]:
        """State, restarts and log of the job when it is over."""
        state = self.slurm.wait(job, timeout_s)
        return state, int(self.slurm.job(job)["Restarts"]), self.log(job)


@pytest.fixture
def site(slurm, tmp_path) -> Site:
    return Site(slurm, tmp_path)


@pytest.fixture
def conversations(tmp_path) -> str:
    """A few rows for supervised training, the cheapest run there is."""
    file = tmp_path / "conversations.jsonl"
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    file.write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    return str(file)


def test_launch_trains_to_the_end_and_leaves_no_secret(site, conversations):
    recipe = site.folder / "recipe.yaml"
    sft = {"data": conversations, "steps": 2, "batch_size": 4}
    recipe.write_text(yaml.safe_dump({"base": QUICKSTART, "sft": sft}))
    out = site.matpo(
        str(recipe), "--cluster", site.cluster(), "--command", "sft", "parallel.tensor=1"
    )
    job = out.split("submitted job ")[1].split(":")[0]
    state, restarts, log = site.finish(job, timeout_s=120)
    assert (state, restarts) == ("COMPLETED", 0), log
    assert f"{site.run}/logs/slurm-{job}.log" in out
    assert f"scancel {job}" in out
    assert len(read_metrics(site.run)) == 2
    assert "matpo: done" in log
    assert "\x1b" not in log, "a job's log is no terminal"
    assert json.loads((site.run / "slurm" / "job.json").read_text())["job_id"] == job
    texts = [path.read_bytes() for path in site.folder.rglob("*") if path.is_file()]
    assert len(texts) > 10, "NeMo-Run's files were found"
    assert not any(SECRET.encode() in text for text in texts)


def test_a_written_file_trains_to_the_end(site, conversations):
    script = str(site.folder / "job.sbatch")
    overrides = [f"sft.data={conversations}", "sft.steps=2", "sft.batch_size=4"]
    arguments = [QUICKSTART, "--cluster", site.cluster(), "--command", "sft", "--write", script]
    site.matpo(*arguments, "parallel.tensor=1", *overrides)
    env = {"SERPER_API_KEY": SECRET, "PYTHONPATH": str(ROOT)}
    job = site.slurm.sbatch(script, "run.name=other", cwd=site.folder, env=env)
    site.run = site.folder / "runs" / "other"
    state, restarts, log = site.finish(job, timeout_s=120)
    assert (state, restarts) == ("COMPLETED", 0), log
    assert len(read_metrics(site.run)) == 2


def test_a_stop_that_saved_is_requeued_and_goes_on(site):
    out = site.matpo(QUICKSTART, "--cluster", site.cluster("save:4 exit:75\nexit:0"))
    job = out.split("submitted job ")[1].split(":")[0]
    state, restarts, log = site.finish(job)
    assert (state, restarts) == ("COMPLETED", 1), log
    assert log.count("the run saved and stopped early") == 1
    assert "attempt 1 from checkpoint step_4" in log
    assert not (site.run / "slurm" / "attempts").exists()


def test_a_failure_is_tried_again_up_to_the_bound_and_named(site):
    job = site.submit("fail:1:the_disk_is_full")
    state, restarts, log = site.finish(job)
    assert (state, restarts) == ("FAILED", 1), log
    reason = "trainer-0, phase learn: RuntimeError: the disk is full"
    assert log.count(f"matpo: reason: n1: {reason}") + log.count(f"reason: n2: {reason}") == 2
    assert log.rstrip().endswith("matpo: giving up: 2 attempts without a newer checkpoint")


def test_failures_with_checkpoints_between_them_are_not_added_up(site):
    job = site.submit("save:1 exit:1\nexit:0", max_restarts=0)
    state, restarts, log = site.finish(job)
    assert (state, restarts) == ("COMPLETED", 1), log


def test_a_wrong_configuration_is_not_tried_again(site):
    job = site.submit("exit:2")
    state, restarts, log = site.finish(job)
    assert (state, restarts) == ("FAILED", 0), log
    assert "not requeued: the configuration has to be changed first" in log


def test_the_reason_is_the_node_that_failed_not_the_one_that_was_stopped(site):
    # Slurm's exit code of the job step would be that of the other node, which is ended by a signal.
    job = site.submit("n1=wait n2=fail:1:out_of_memory", "--nodes=2", max_restarts=0)
    state, restarts, log = site.finish(job)
    assert (state, restarts) == ("FAILED", 0), log
    assert "reason: n2: trainer-0, phase learn: RuntimeError: out of memory" in log
    assert "attempt 1 ended with exit code 1" in log


def test_a_node_that_fails_the_preflight_is_left_out_next_time(site):
    job = site.submit("n1=bad exit:0", "--nodelist=n1")
    site.slurm.wait_for(job, {"PENDING"}, timeout_s=60)
    site.slurm.run("scontrol", "update", f"JobId={job}", "ReqNodeList=")
    state, restarts, log = site.finish(job)
    assert (state, restarts) == ("COMPLETED", 1), log
    assert site.slurm.job(job)["NodeList"] == "n2"
    assert "leaving out n1" in log


def test_the_warning_before_the_time_limit_reaches_the_run_only(site):
    job = site.submit("wait save:1 exit:75\nexit:0")
    site.slurm.wait_for(job, {"RUNNING"}, timeout_s=60)
    _wait_for_text(site, job, "stand-in: train")
    site.slurm.run("scancel", "--signal=TERM", job)
    state, restarts, log = site.finish(job)
    assert (state, restarts) == ("COMPLETED", 1), log


def test_a_stop_while_the_preflight_runs_is_no_failure(site, conversations):
    file = Path(site.cluster())
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "preflight": True}))
    script = str(site.folder / "job.sbatch")
    overrides = [f"sft.data={conversations}", "sft.steps=2", "sft.batch_size=4"]
    arguments = [QUICKSTART, "--cluster", str(file), "--command", "sft", "--write", script]
    site.matpo(*arguments, "parallel.tensor=1", *overrides)
    env = {"SERPER_API_KEY": SECRET, "PYTHONPATH": str(ROOT)}
    job = site.slurm.sbatch(script, cwd=site.folder, env=env)
    _wait_for_text(site, job, "attempt 1 from checkpoint none")
    time.sleep(2)  # the interpreter has started, the doctor has not ended
    site.slurm.run("scancel", "--signal=USR1", job)
    state, restarts, log = site.finish(job, timeout_s=180)
    assert (state, restarts) == ("COMPLETED", 1), log
    assert "SIGUSR1: stopped before the run had begun" in log
    assert log.count("attempt 1 from checkpoint none") == 2, "it was not counted"
    assert len(read_metrics(site.run)) == 2


def test_a_second_job_of_a_run_leaves_the_first_alone(site):
    first = site.submit("wait save:1 exit:0")
    _wait_for_text(site, first, "stand-in: train")
    second = site.slurm.sbatch(
        str(site.folder / "job.sbatch"), cwd=site.folder, env={"SERPER_API_KEY": SECRET}
    )
    assert site.slurm.wait(second, timeout_s=60) == "FAILED"
    (said,) = site.folder.glob(f"*-{second}.out")
    assert f"job {first} of the same run is running" in said.read_text()
    assert site.slurm.job(first)["JobState"] == "RUNNING"
    site.slurm.run("scancel", "--signal=TERM", first)
    state, restarts, log = site.finish(first)
    assert (state, restarts) == ("COMPLETED", 0), log


def test_a_cancelled_job_stays_cancelled(site):
    job = site.submit("wait save:1 exit:75")
    site.slurm.wait_for(job, {"RUNNING"}, timeout_s=60)
    _wait_for_text(site, job, "stand-in: train")
    site.slurm.run("scancel", job)
    state, restarts, log = site.finish(job)
    assert (state, restarts) == ("CANCELLED", 0), log
    assert "not requeued" in log


def test_a_job_whose_node_dies_goes_on_elsewhere(site):
    job = site.submit("save:1 wait\nexit:0")
    site.slurm.wait_for(job, {"RUNNING"}, timeout_s=60)
    _wait_for_text(site, job, "stand-in: train")
    node = site.slurm.job(job)["NodeList"]
    site.slurm.stop_node(node)
    try:
        state, restarts, log = site.finish(job, timeout_s=120)
        assert (state, restarts) == ("COMPLETED", 1), log
        assert site.slurm.job(job)["NodeList"] != node
        assert "attempt 1 from checkpoint step_1" in log
    finally:
        site.slurm.start_node(node)


def _wait_for_text(site: Site, job: str, text: str) -> None:
    end = time.monotonic() + 60
    while text not in site.log(job):
        assert time.monotonic() < end, site.log(job)
        time.sleep(0.2)
