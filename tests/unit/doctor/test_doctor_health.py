"""Proves when the container's health check calls a run unhealthy; on real run folders."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.run import RunConfig
from megatron_matpo.doctor.health import problems
from megatron_matpo.launch.run_folder import open_run_folder
from megatron_matpo.obs.failure import record_failure


@pytest.fixture
def run(tmp_path):
    """A run that is going on: this process holds its lock."""
    folder, _ = open_run_folder(Config(run=RunConfig(name="x", dir=str(tmp_path))), "train")
    yield folder.path
    os.close(folder.lock_descriptor)


def test_a_run_that_writes_is_healthy_and_one_that_is_silent_is_not(tmp_path, run):
    now = time.time()
    assert problems(tmp_path, 60.0, now) == []
    (silent,) = problems(tmp_path, 60.0, now + 3600)
    assert "x: nothing was written for 36" in silent
    log = run / "logs" / "manager.log"
    log.write_text("busy")
    os.utime(log, (now + 3590, now + 3590))
    assert problems(tmp_path, 60.0, now + 3600) == []


def test_a_failed_process_of_a_run_that_goes_on_is_named(tmp_path, run):
    record_failure(run, "trainer", 3, "train", ValueError("bad luck"), "traceback")
    (line,) = problems(tmp_path, 60.0, time.time())
    assert line == f"{run}: trainer-3 failed: bad luck"
    done = subprocess.run(
        [sys.executable, "-m", "megatron_matpo.doctor.health", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, line + "\n")


def test_no_run_or_one_that_has_ended_is_healthy(tmp_path):
    assert problems(tmp_path / "nothing", 60.0, 0.0) == []
    folder, _ = open_run_folder(Config(run=RunConfig(name="y", dir=str(tmp_path))), "train")
    record_failure(folder.path, "trainer", 0, "train", ValueError("bad luck"), "traceback")
    os.close(folder.lock_descriptor)
    assert problems(tmp_path, 60.0, time.time() + 1e6) == []
