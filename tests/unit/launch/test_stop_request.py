"""Ending early with a checkpoint, as the supervisor sees it (FakeRoles; see test_supervisor.py)."""

from __future__ import annotations

import signal

import pytest

from megatron_matpo.obs.status import PhaseWriter
from tests.helpers.supervised import FakeRun

TRAINER = "trainer ready saves=0.3"


@pytest.mark.parametrize(
    ("number", "environ"),
    [(signal.SIGUSR1, {}), (signal.SIGTERM, {"SAVE_ON_STOP": "1"})],
)
def test_the_trainer_saves_and_the_command_says_75(tmp_path, number, environ):
    run = FakeRun(tmp_path, "engine-0 ready", TRAINER, SAVE_TIMEOUT_S="20", **environ)
    run.wait_for_log("trainer", "hello")
    run.process.send_signal(number)
    code, output = run.wait()
    assert code == 75, output
    assert f"{number.name}: saving a checkpoint, then stopping (run.save_timeout_s=20)" in output
    assert "stopped early, after saving" in output
    assert "failed" not in output
    run.assert_nothing_left(within_s=0)


def test_engines_that_the_scheduler_stops_do_not_end_the_save(tmp_path):
    run = FakeRun(
        tmp_path, "engine-0 ready exit_after=2.5", "trainer ready saves=3", SAVE_TIMEOUT_S="20"
    )
    run.wait_for_log("trainer", "hello")
    run.process.send_signal(signal.SIGUSR1)
    code, output = run.wait()
    assert code == 75, output
    assert "failed" not in output


def test_a_trainer_that_does_not_save_in_time_is_stopped(tmp_path):
    run = FakeRun(tmp_path, "engine-0 ready", "trainer ready", SAVE_TIMEOUT_S="1")
    run.wait_for_log("trainer", "hello")
    run.process.send_signal(signal.SIGUSR1)
    code, output = run.wait()
    assert code == 1, output
    assert "did not end inside run.save_timeout_s=1; the last checkpoint stands" in output
    run.assert_nothing_left(within_s=0)


def test_what_has_nothing_to_save_stops_at_once(tmp_path):
    run = FakeRun(tmp_path, "engine-0 ready", "trainer ready")
    run.wait_for_log("trainer", "hello")
    run.process.send_signal(signal.SIGUSR1)
    code, output = run.wait()
    assert code == 75, output
    assert "SIGUSR1: stopping everything" in output


def test_a_run_that_is_still_starting_stops_at_once(tmp_path):
    run = FakeRun(tmp_path, "engine-0", "trainer ready", SAVE_TIMEOUT_S="20")
    run.wait_for_log("trainer", "hello")
    run.process.send_signal(signal.SIGUSR1)
    code, output = run.wait()
    assert code == 75, output
    assert "SIGUSR1: stopping everything" in output


def test_a_trainer_that_waits_for_engines_has_nothing_to_save(tmp_path):
    run = FakeRun(tmp_path, "trainer ready", SAVE_TIMEOUT_S="20")
    run.wait_for_log("trainer", "hello")
    PhaseWriter(tmp_path, "trainer", 0).set("connect")
    run.process.send_signal(signal.SIGUSR1)
    code, output = run.wait()
    assert code == 75, output
    assert "SIGUSR1: stopping everything" in output


def test_a_trainer_that_has_begun_saves_whatever_was_seen_before(tmp_path):
    # As if its first step came between two looks of the supervisor: not known to be ready.
    run = FakeRun(tmp_path, "trainer saves=0.3", SAVE_TIMEOUT_S="20")
    run.wait_for_log("trainer", "hello")
    PhaseWriter(tmp_path, "trainer", 0).set("train", 1)
    run.process.send_signal(signal.SIGUSR1)
    code, output = run.wait()
    assert code == 75, output
    assert "stopped early, after saving" in output


def test_a_trainer_that_fails_while_it_saves_is_a_failure(tmp_path):
    run = FakeRun(
        tmp_path, "engine-0 ready", "trainer ready exit_after=2.5 code=1", SAVE_TIMEOUT_S="20"
    )
    run.wait_for_log("trainer", "hello")
    run.process.send_signal(signal.SIGUSR1)
    code, output = run.wait()
    assert code == 1, output
    assert "first failure: trainer" in output
