"""Proves what a task leaves behind of how it ended, and what `matpo status` makes of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_matpo.errors import ConfigError, MatpoError
from megatron_matpo.launch import slurm_task
from megatron_matpo.launch.slurm_state import queued_job, slurm_lines
from megatron_matpo.launch.stopping import SIGNALS
from megatron_matpo.obs.failure import record_failure


@pytest.fixture(autouse=True)
def node(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def ending(run: Path, monkeypatch, body, *options: str) -> tuple[int, list[str]]:
    """Exit code of the task and the words it left."""
    monkeypatch.setattr(slurm_task, "run", body)
    code = slurm_task.main([*options, "--run-dir", str(run), "train", "r.yaml", "a=b"])
    text = (run / "slurm" / "exits" / "n7").read_text()
    return code, text.split(" ", 3)[1:]


def test_an_evaluation(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(slurm_task, "evaluate", lambda request: seen.append(request) or 0)
    words = ("eval", "r.yaml", "--model", "m", "a=b", "c=d")
    assert slurm_task.main(["--run-dir", str(tmp_path), *words]) == 0
    assert (seen[0].recipe, seen[0].model, seen[0].overrides) == ("r.yaml", "m", ["a=b", "c=d"])


@pytest.mark.parametrize("code", [0, 75])
def test_endings_that_are_no_failure(tmp_path, monkeypatch, code):
    seen = []

    def run(*words) -> int:
        seen.append(words)
        return code

    assert ending(tmp_path, monkeypatch, run)[0] == code
    assert seen == [("train", "r.yaml", ["a=b"])]


def test_the_reason_is_the_first_failure_of_the_run(tmp_path, monkeypatch):
    def run(*words) -> int:
        record_failure(tmp_path, "trainer", 3, "learn", RuntimeError("disk\nfull"), "")
        return 1

    code, words = ending(tmp_path, monkeypatch, run)
    assert code == 1
    assert words == ["1", "n7", "trainer-3, phase learn: RuntimeError: disk full\n"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("steps=x: expected"), 2), (MatpoError("in use"), 1), (OSError("gone"), 1)],
)
def test_errors_before_the_run_are_reasons_too(tmp_path, monkeypatch, capsys, error, code):
    def run(*words) -> int:
        raise error

    found, words = ending(tmp_path, monkeypatch, run)
    assert (found, words[0]) == (code, str(code))
    assert str(error) in words[2]
    assert str(error) in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_stop_before_the_run_has_begun_is_no_failure(tmp_path, monkeypatch, number):
    def run(*words) -> int:
        try:
            os.kill(os.getpid(), number)  # as while the nodes meet
        except Exception as error:
            raise AssertionError("handlers of errors must not see it") from error
        raise AssertionError("was stopped")

    code, words = ending(tmp_path, monkeypatch, run)
    assert code == 75
    assert words[2] == f"{number.name}: stopped before the run had begun\n"


class Doctor:
    def __init__(self, returncode: int) -> None:
        self.returncode = returncode

    def run(self, command, check) -> Doctor:
        assert command[2:] == ["megatron_matpo", "doctor", "--preflight", "r.yaml", "a=b"]
        return self


@pytest.mark.parametrize(("code", "is_bad"), [(1, True), (2, False), (3, False)])
def test_a_preflight_that_fails_ends_the_task_and_names_the_node(
    tmp_path, monkeypatch, code, is_bad
):
    monkeypatch.setattr(slurm_task, "subprocess", Doctor(code))
    found, words = ending(tmp_path, monkeypatch, lambda *words: 0, "--preflight")
    assert found == code
    assert "matpo doctor --preflight" in words[2]
    assert (tmp_path / "slurm" / "bad_nodes").exists() == is_bad


def test_a_preflight_that_passes_is_followed_by_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm_task, "subprocess", Doctor(0))
    assert ending(tmp_path, monkeypatch, lambda *words: 75, "--preflight")[0] == 75


@pytest.fixture
def job(tmp_path) -> Path:
    folder = tmp_path / "slurm"
    folder.mkdir()
    text = {"job_id": "12", "nodes": "n[1-2]", "attempt": 2, "max_restarts": 5, "restarts": 3}
    (folder / "job.json").write_text(json.dumps(text))
    return tmp_path


def squeue(folder: Path, monkeypatch, body: str) -> None:
    (folder / "squeue").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("body", "state"),
    [
        ("echo 'RUNNING|n[1-2]|None'", "RUNNING on n[1-2]"),
        ("echo 'PENDING||BeginTime'", "PENDING (BeginTime)"),
        ("echo 'slurm_load_jobs error: Invalid job id' >&2; exit 1", "ended (last on n[1-2])"),
        ("exit 0", "ended (last on n[1-2])"),
        ("sleep 30", "state unknown (squeue did not answer within 0.2 s)"),
    ],
)
def test_the_state_of_a_job(job, monkeypatch, body, state):
    monkeypatch.setattr(
        "megatron_matpo.launch.slurm_state._DEADLINE_S", 0.2 if "sleep" in body else 30
    )
    squeue(job, monkeypatch, body)
    first, second = slurm_lines(job)
    assert first == f"  slurm job 12: {state}"
    assert second.startswith("  attempt 2 of 6 without a newer checkpoint; log ")


@pytest.mark.parametrize(
    ("body", "found"),
    [("echo 'PENDING||Priority'", "job 12, PENDING (Priority)"), ("exit 1", ""), ("exit 0", "")],
)
def test_whether_a_job_of_the_run_is_there(job, monkeypatch, body, found):
    squeue(job, monkeypatch, body)
    assert queued_job(job) == found
    assert queued_job(job / "nowhere") == ""


def test_bad_nodes_are_told(job, monkeypatch):
    squeue(job, monkeypatch, "exit 0")
    (job / "slurm" / "bad_nodes").write_text("n2\nn1\nn2\n")
    assert slurm_lines(job)[-1] == "  left out after a failed preflight: n1, n2"


def test_a_run_without_slurm(tmp_path):
    assert slurm_lines(tmp_path) == []
