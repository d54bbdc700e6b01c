"""Proves what the batch script does after each ending, with bash and a scontrol that writes down.

A real Slurm does the same in tests/smoke/test_slurm.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from megatron_matpo.config.cluster_file import BareSection, ClusterFile, SlurmSection
from megatron_matpo.config.load import load_recipe
from megatron_matpo.launch.job import Request, describe_job
from megatron_matpo.launch.sbatch import sbatch_text
from tests.helpers.matpo import QUICKSTART

SECRET = "sk-planted-0123456789"


@dataclass
class Attempt:
    """Runs the script once, as Slurm would, with an srun that does what it is told."""

    folder: Path
    cluster: ClusterFile = field(default_factory=ClusterFile)
    nodes: int = 1
    env: dict[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "quickstart"

    def __call__(self, srun: str, *arguments: str, restarts: int = 0) -> int:
        config = load_recipe(QUICKSTART, [])
        job = describe_job(config, self.cluster, Request("train", "r.yaml", ("a=b c",)))
        script = self.folder / "job.sbatch"
        script.write_text(sbatch_text(job, "", "job.sbatch"))
        programs = self.folder / "programs"
        programs.mkdir(exist_ok=True)
        exits = self.run / "slurm" / "exits"
        for name, body in (
            ("srun", f"cd {exits} 2>/dev/null\n{srun}"),
            ("scontrol", f"[ $1 = show ] && echo $STATE || echo $* >>{self.folder}/scontrol"),
        ):
            (programs / name).write_text(f"#!/bin/bash\n{body}\n")
            (programs / name).chmod(0o755)
        slurm = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": str(self.nodes),
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_RESTART_COUNT": str(restarts),
        }
        path = f"{programs}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(script), *arguments],
            env={"PATH": path, "HOME": str(self.folder), **slurm, **self.env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self.said = done.stdout + done.stderr
        return done.returncode

    @property
    def log(self) -> str:
        return (self.run / "logs" / "slurm-7.log").read_text()

    @property
    def asked(self) -> list[str]:
        """What Slurm was asked for since the last look."""
        path = self.folder / "scontrol"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return lines

    def save(self, step: int) -> None:
        (self.run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (self.run / "checkpoints" / "latest").write_text(f"step_{step}")


@pytest.fixture
def attempt(tmp_path) -> Attempt:
    return Attempt(tmp_path, ClusterFile(slurm=SlurmSection(max_restarts=2)))


def test_done(attempt):
    assert attempt("exit 0") == 0
    assert attempt.asked == []
    assert attempt.log.rstrip().endswith("matpo: done")
    assert "slurm-7.log" in attempt.said
    job = json.loads((attempt.run / "slurm" / "job.json").read_text())
    assert job == {
        **{"job_id": "7", "nodes": "n[1-2]", "attempt": 1, "max_restarts": 2, "restarts": 0}
    }


def test_the_tasks_get_the_words_as_they_are(attempt):
    assert attempt('printf "<%s>" "$@"', "x=[1, 2]") == 0
    assert "<train><r.yaml><a=b c><x=[1, 2]>" in attempt.log


def test_the_folder_of_another_name(attempt):
    assert attempt('printf "<%s>" "$@"; exit 3', "run.dir=other", "run.name=mine") == 3
    log = (attempt.folder / "other" / "mine" / "logs" / "slurm-7.log").read_text()
    assert "<--run-dir><other/mine>" in log


def test_a_saved_stop_is_requeued_and_not_counted(attempt):
    for restarts in range(5):
        assert attempt("echo '1 75 n1 stopped' >n1; exit 75", restarts=restarts) == 75
        assert attempt.asked == ["requeue 7"]
    assert attempt.log.count("attempt 1 from checkpoint none") == 5


def test_failures_are_counted(attempt):
    for _ in range(2):
        assert attempt("echo '1 1 n1 broken' >n1; exit 1") == 1
        assert attempt.asked == ["requeue 7"]
    assert attempt("echo '1 1 n1 broken' >n1; exit 1") == 1
    assert attempt.asked == []
    assert "giving up: 3 attempts without a newer checkpoint" in attempt.log
    assert attempt.log.count("reason: n1: broken") == 3


def test_a_newer_checkpoint_starts_the_count_anew(attempt):
    for step in range(6):
        attempt.save(step)
        assert attempt("exit 1") == 1
        assert attempt.asked == ["requeue 7"]


def test_a_checkpoint_during_the_last_attempt_counts(attempt):
    for _ in range(2):
        attempt("exit 1")
    (attempt.run / "checkpoints").mkdir()
    assert attempt("echo step_3 >../../checkpoints/latest; exit 1") == 1
    assert attempt.asked == ["requeue 7"] * 3


def test_node_failures_that_nobody_was_asked_about_are_bounded_too(attempt):
    # Slurm requeues by itself when a node is lost; the script is killed, not ended.
    for restarts in range(3):
        attempt("kill -9 $PPID", restarts=restarts)
    assert attempt("exit 0", restarts=3) == 1
    assert "giving up: 3 attempts without a checkpoint newer than none" in attempt.log


def test_submitting_again_starts_the_count_anew(attempt):
    for _ in range(3):
        attempt("exit 1")
    text = (attempt.run / "slurm" / "attempts").read_text()
    (attempt.run / "slurm" / "attempts").write_text(text.replace("7 ", "6 ", 1))
    attempt.asked.clear()
    assert attempt("exit 1") == 1
    assert attempt.asked == ["requeue 7"]


def test_a_wrong_configuration_is_not_requeued(attempt):
    assert attempt("echo '1 2 n1 steps=x: expected' >n1; exit 2") == 2
    assert attempt.asked == []
    assert "reason: n1: steps=x: expected" in attempt.log


@pytest.mark.parametrize(
    ("exits", "code", "reason"),
    [
        (["3 143 n1 stopped", "2 1 n2 cause"], 1, "n2: cause"),
        (["1 1 n1 echo", "2 2 n2 wrong"], 2, "n2: wrong"),
        (["5 1 n1 late", "4 1 n2 early"], 1, "n2: early"),
        (["4 3 n1 another node", "5 1 n2 bad"], 1, "n2: bad"),
        (["4 3 n1 nobody", "5 3 n2 nobody"], 3, "n1: nobody"),
        (["1 75 n1 saved", "2 143 n2 stopped"], 75, "n1: saved"),
        (["1 0 n1 ", "2 143 n2 stopped"], 137, "no task said why (exit code 137)"),
        ([], 137, "no task said why (exit code 137)"),
    ],
)
def test_which_task_decides(attempt, exits, code, reason):
    attempt.nodes = 2
    lines = "".join(f"echo '{line}' >{line.split()[2]}\n" for line in exits)
    assert attempt(f"{lines}exit 137") == code
    assert f"matpo: reason: {reason}" in attempt.log


# SIGTERM of the batch script itself is how Slurm ends a job before it kills.
CANCELLED = "kill -TERM $PPID; echo '1 143 n1 stopped' >n1; exit 143"


def test_a_cancelled_job_is_not_requeued(attempt):
    assert attempt(CANCELLED) == 143
    assert attempt.asked == []
    assert "not requeued: the job was cancelled" in attempt.log


def test_a_job_that_is_preempted_after_it_saved_is_not_counted(attempt):
    saved = "kill -TERM $PPID; echo '1 75 n1 saved' >n1; exit 75"
    for restarts in range(5):
        assert attempt(saved, restarts=restarts) == 75
        assert attempt.asked == [], "Slurm itself starts it again"
    assert attempt.log.count("attempt 1 from checkpoint none") == 5


@pytest.mark.parametrize(
    ("left_s", "code"), [(1100, 2), (1300, 0), (None, 0)], ids=["short", "enough", "no limit"]
)
def test_a_job_that_would_be_warned_at_its_start_is_refused(attempt, left_s, code):
    moment = datetime.now() + timedelta(seconds=left_s or 0)
    end = "Unknown" if left_s is None else moment.isoformat(timespec="seconds")
    attempt.env = {"STATE": f"JobId=7 StartTime=2026-11-25T10:00:00 EndTime={end} Deadline=N/A"}
    assert attempt("exit 0") == code
    assert ("ask for more time (slurm.time_limit" in attempt.said) == (code == 2)
    assert attempt.asked == []


def test_a_second_job_of_a_run_leaves_the_first_alone(attempt):
    assert attempt("echo '1 1 n1 x' >n1; exit 1") == 1
    folder = attempt.run / "slurm"
    job = (folder / "job.json").read_text().replace('"7"', '"6"')
    (folder / "job.json").write_text(job)
    attempt.env = {"STATE": "JobId=6 ArrayJobId=6 JobState=RUNNING Reason=None"}
    attempt.asked.clear()
    assert attempt("exit 0") == 2
    assert "job 6 of the same run is running" in attempt.said
    assert (folder / "job.json").read_text() == job
    assert (folder / "exits" / "n1").exists()
    assert attempt.asked == []
    attempt.env = {"STATE": "JobId=6 JobState=COMPLETED Reason=None"}
    assert attempt("exit 0") == 0


def test_a_job_whose_time_is_over_is_requeued_and_counted(attempt):
    attempt.env = {"STATE": "JobId=7 JobState=COMPLETING Reason=TimeLimit"}
    for _ in range(2):
        assert attempt(CANCELLED) == 143
        assert attempt.asked == ["requeue 7"]
    assert attempt(CANCELLED) == 143
    assert attempt.asked == []
    assert "slurm.stop_lead_s was too short" in attempt.log


def test_bad_nodes_are_left_out(attempt):
    attempt.cluster = ClusterFile(slurm=SlurmSection(exclude=["n9"], max_restarts=2))
    attempt.nodes = 2
    bad = "echo n1 >../bad_nodes; echo '1 1 n1 doctor' >n1; exit 1"
    assert attempt(bad) == 1
    assert attempt.asked == ["requeue 7", "update JobId=7 ExcNodeList=n9,n1"]


def test_all_nodes_bad_is_not_the_nodes_fault(attempt):
    attempt.nodes = 2
    bad = "printf 'n1\\nn2\\n' >../bad_nodes; echo '1 1 n1 x' >n1; echo '1 1 n2 x' >n2; exit 1"
    assert attempt(bad) == 1
    assert attempt.asked == ["requeue 7"]
    assert "every node failed the preflight" in attempt.log


def test_the_only_node_of_a_job_may_be_bad(attempt):
    assert attempt("echo n1 >../bad_nodes; echo '1 1 n1 x' >n1; exit 1") == 1
    assert attempt.asked == ["requeue 7", "update JobId=7 ExcNodeList=n1"]


def test_a_line_of_the_site_that_fails_ends_the_attempt(attempt):
    attempt.cluster = ClusterFile(bare=BareSection(setup=["module load cuda"]))
    assert attempt("exit 0") == 1
    assert attempt.asked == ["requeue 7"]


def with_secret(file: str = "") -> ClusterFile:
    return ClusterFile(secret_env=["MY_KEY"], secret_file=file)


def test_a_secret_of_the_submitting_shell(attempt):
    attempt.cluster, attempt.env = with_secret(), {"MY_KEY": SECRET}
    assert attempt("test -n $MY_KEY") == 0
    assert SECRET not in attempt.log


def test_a_secret_of_a_file(attempt):
    attempt.cluster = with_secret("~/keys")
    file = attempt.folder / "keys"
    file.write_text(f"OTHER=x\nMY_KEY={SECRET}=")
    file.chmod(0o600)
    assert attempt(f"test $MY_KEY = {SECRET}= && test -z $OTHER") == 0
    assert SECRET not in attempt.log


def test_a_file_that_others_can_read(attempt):
    attempt.cluster = with_secret("~/keys")
    (attempt.folder / "keys").write_text(f"MY_KEY={SECRET}")
    (attempt.folder / "keys").chmod(0o644)
    assert attempt("exit 0") == 2
    assert "others can read it: chmod 600" in attempt.log
    assert attempt.asked == []
    assert SECRET not in attempt.log


def test_a_secret_that_is_nowhere(attempt):
    attempt.cluster = with_secret()
    assert attempt("exit 0") == 2
    assert "MY_KEY is not set" in attempt.log
    assert attempt.asked == []
