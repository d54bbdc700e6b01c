"""The supervisor with small real processes (FakeRoles).

Proves that the first failure is named and that nothing survives a run, however it ends. Does not
prove that real roles become ready.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.supervised import FakeRun


@pytest.fixture
def fake_run(tmp_path: Path) -> Iterator[type[FakeRun]]:
    runs: list[FakeRun] = []

    class Tracked(FakeRun):
        def __init__(self, *roles: str, **options):
            super().__init__(tmp_path, *roles, **options)
            runs.append(self)

    yield Tracked  # type: ignore[misc]
    for run in runs:
        if run.process.poll() is None:
            run.process.terminate()
            run.wait()


def test_a_finished_trainer_ends_the_run_and_stops_the_others(fake_run):
    run = fake_run("engine-0 ready spawn", "trainer ready exit_after=0.5")
    code, output = run.wait()
    assert code == 0, output
    assert "engine-0 ready after" in output
    assert "failed" not in output
    run.assert_nothing_left(within_s=0)


def test_a_role_that_dies_is_named_with_its_last_words(fake_run):
    run = fake_run("engine-0 ready", "manager ready exit_after=0.3 code=7", "trainer ready")
    code, output = run.wait()
    assert code == 1
    assert "first failure: manager" in output
    assert "exit code 7" in output
    assert "| Fake manager last words" in output
    run.assert_nothing_left(within_s=0)


def test_an_engine_that_dies_at_start_is_reported_in_seconds(fake_run):
    run = fake_run("engine-0 exit_after=0.1 code=1", "trainer", start_timeout_s=300)
    code, output = run.wait()
    assert code == 1
    assert "first failure: engine-0" in output
    assert time.monotonic() - run.started < 6


def test_a_recorded_failure_comes_before_the_exit_code(fake_run):
    run = fake_run("engine-0 ready", "trainer ready fail=bad-number exit_after=0.3 code=1")
    code, output = run.wait()
    assert code == 1
    assert "first failure: trainer-0, phase train" in output
    assert "ValueError: bad-number" in output


def test_a_role_that_is_not_ready_in_time_is_named(fake_run):
    run = fake_run("engine-0", "trainer ready", start_timeout_s=4)
    code, output = run.wait()
    assert code == 1
    assert "first failure: engine-0, phase start" in output
    assert "run.start_timeout_s=4" in output
    assert "| Fake engine-0 says hello" in output


def test_a_program_that_does_not_exist_is_a_clear_error(tmp_path):
    script = (
        "import sys; from pathlib import Path; "
        "from megatron_matpo.launch.console import Console, ProgressView; "
        "from megatron_matpo.launch.supervisor import Limits, Supervisor; "
        "from megatron_matpo.launch.roles import RoleSpec; "
        "from tests.helpers.plans import lone_meeting; "
        "c = Console(sys.stdout); d = Path(sys.argv[1]); "
        "r = RoleSpec('engine-0', ('/no/such/program',), {}, lambda: False); "
        "v = ProgressView(d, 1, c); "
        "sys.exit(Supervisor(d, [r], Limits(5, 1), c, v, lone_meeting(d)).run())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 1
    assert "cannot start /no/such/program" in done.stdout


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
def test_a_signal_stops_everything_and_says_how_to_resume(fake_run, number, code):
    run = fake_run("engine-0 ready spawn ignore_term", "trainer ready spawn")
    run.wait_for_log("engine-0", "hello")
    run.wait_for_log("trainer", "hello")
    run.process.send_signal(number)
    returned, output = run.wait()
    assert returned == code
    assert "resumes" in output
    run.assert_nothing_left(within_s=0)


def test_a_killed_guard_leaves_nothing(fake_run):
    run = fake_run("engine-0 ready spawn ignore_term", "trainer ready spawn")
    run.wait_for_log("engine-0", "hello")
    run.wait_for_log("trainer", "hello")
    run.process.kill()
    run.assert_nothing_left()


def test_a_killed_supervisor_leaves_nothing(fake_run):
    run = fake_run("engine-0 ready spawn ignore_term", "trainer ready spawn")
    pid = int(run.wait_for_line(r"supervisor pid (\d+)").group(1))
    run.wait_for_log("engine-0", "hello")
    run.wait_for_log("trainer", "hello")
    os.kill(pid, signal.SIGKILL)
    code, output = run.wait()
    assert code == 128 + signal.SIGKILL
    assert "ended by SIGKILL" in output
    run.assert_nothing_left(within_s=0)


def test_lines_of_an_earlier_attempt_are_not_reported(fake_run, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "manager.log").write_text("words of yesterday\n")
    run = fake_run("manager ready exit_after=0.1 code=1", "trainer ready")
    _, output = run.wait()
    assert "Fake manager last words" in output
    assert "yesterday" not in output
