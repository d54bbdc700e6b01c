"""Resume parity: a run that was killed continues bit for bit like one that was not.

The rollouts are recorded once with real servers, then replayed, so that sampling cannot differ.
"""

import json
import os
import signal
import time

import psutil
import pytest

from megatron_matpo.wire import recording_path
from tests.helpers.matpo import (
    QUICKSTART,
    read_metrics,
    run_matpo,
    start_matpo,
    wait_for_step,
    wait_until_gone,
)
from tests.smoke.conftest import BATCH, STEPS

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(900)]


def losses(run_dir):
    """All metrics of the optimizer and the policy, as written (full precision)."""
    kept = ("loss/", "optim/", "policy/", "mismatch/", "tokens/")
    return {
        line["step"]: {name: value for name, value in line.items() if name.startswith(kept)}
        for line in read_metrics(run_dir)
    }


def replay(live_run, folder, name):
    return [
        *("train", QUICKSTART, f"run.dir={folder}", f"run.name={name}", *BATCH),
        *(f"rollout.replay={live_run / 'rollouts'}", "checkpoint.every=2"),
    ]


def test_replay_gives_the_live_run_again(live_run, tmp_path):
    done = run_matpo(*replay(live_run, tmp_path, "again"))
    assert done.returncode == 0, done.stdout
    assert losses(tmp_path / "again") == losses(live_run)


def victim_pid(run_dir, process, victim):
    """The process that is killed: the command itself, its supervisor, or a trainer rank."""
    if victim == "command":
        return process.pid
    if victim == "supervisor":
        (child,) = psutil.Process(process.pid).children()
        return child.pid
    return json.loads((run_dir / "status" / "trainer-1.json").read_text())["pid"]


@pytest.mark.parametrize(
    ("after_step", "victim"), [(1, "command"), (2, "supervisor"), (3, "trainer rank")]
)
def test_sigkill_and_the_same_command_again(live_run, tmp_path, after_step, victim):
    command = replay(live_run, tmp_path, "killed")
    run_dir = tmp_path / "killed"
    process = start_matpo(*command, log=tmp_path / "out.log")
    wait_for_step(run_dir, after_step, timeout_s=120)
    os.kill(victim_pid(run_dir, process, victim), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert wait_until_gone(run_dir) == []
    assert not (run_dir / "checkpoints" / "hf").exists(), "the run was over before the kill"
    done = run_matpo(*command)
    assert done.returncode == 0, done.stdout
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, STEPS + 1))
    assert losses(run_dir) == losses(live_run)


def test_ctrl_c_stops_everything_and_says_how_to_resume(live_run, tmp_path):
    command = replay(live_run, tmp_path, "stopped")
    log = tmp_path / "out.log"
    process = start_matpo(*command, log=log)
    wait_for_step(tmp_path / "stopped", 1, timeout_s=120)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - started < 30
    assert wait_until_gone(tmp_path / "stopped") == []
    assert "resume" in log.read_text()


def test_a_scheduler_that_signals_every_process_loses_nothing(live_run, tmp_path):
    # Four recordings over and over: a run that is long enough to be stopped in the middle.
    steps, recordings = 40, tmp_path / "recordings"
    recordings.mkdir()
    for step in range(1, steps + 1):
        source = recording_path(live_run / "rollouts", (step - 1) % STEPS + 1)
        recording_path(recordings, step).symlink_to(source)

    def command(name):
        replayed = replay(live_run, tmp_path, name)
        options = (f"rollout.replay={recordings}", f"run.steps={steps}", "checkpoint.every=0")
        return [*replayed, *options, "run.save_on_stop=true"]

    whole = run_matpo(*command("whole"))
    assert whole.returncode == 0, whole.stdout
    run_dir, log = tmp_path / "preempted", tmp_path / "out.log"
    process = start_matpo(*command("preempted"), log=log)
    wait_for_step(run_dir, 1, timeout_s=120)
    # As Slurm does: the signal goes to all processes of the job step at once.
    for victim in [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]:
        victim.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75, log.read_text()
    assert wait_until_gone(run_dir) == []
    saved = int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert 1 <= saved < steps
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, saved + 1))
    done = run_matpo(*command("preempted"))
    assert done.returncode == 0, done.stdout
    assert losses(run_dir) == losses(tmp_path / "whole")
