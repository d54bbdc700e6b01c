"""Engines that end are started anew, with small real processes (FakeRoles; see test_supervisor.py).

Proves who is started anew, how often, what the console says, and that nothing of an old process is
left beside the new one. That a real engine gets its weights is in tests/smoke/test_fleet.py.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_matpo.launch.roles import RestartPolicy
from megatron_matpo.obs.restart_request import (
    clear_restart_requests,
    request_restart,
    take_restart_requests,
)
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


def pids_of(run: FakeRun, name: str) -> list[int]:
    """Of all its starts, in order."""
    log = (run.run_dir / "logs" / f"{name}.log").read_text()
    return [int(pid) for pid in re.findall(rf"Fake {name} says hello, pid (\d+)", log)]


def test_an_engine_that_ends_is_started_anew_and_the_run_goes_on(fake_run):
    run = fake_run(
        "engine-0 ready once exit_after=1 code=7 restarts=3", "trainer ready exit_after=4"
    )
    code, output = run.wait()
    assert code == 0, output
    assert (
        "engine-0: exit code 7; starting it anew in 0.3 s "
        "(restart 1, rollout.max_engine_restarts=3)\n"
    ) in output
    assert "  | Fake engine-0 last words\n" in output
    assert re.search(r"engine-0 ready \d+\.\d s after restart 1\n", output)
    log = (run.run_dir / "logs" / "engine-0.log").read_text()
    assert re.findall("=== .*|.* says hello", log) == [
        "Fake engine-0 says hello",
        "=== engine-0: restart 1",
        "Fake engine-0 says hello",
    ]
    run.assert_nothing_left(within_s=0)


def test_nothing_of_the_old_process_is_left_beside_the_new_one(fake_run):
    run = fake_run("engine-0 ready restarts=1 helper", "trainer ready")
    run.wait_for_log("engine-0", "hello")
    run.wait_for_line("trainer ready")
    (first,) = pids_of(run, "engine-0")
    run.wait_for_log("engine-0", "engine-0-helper says hello")
    helpers = [pid for pid in run.pids() if os.getsid(pid) == first and pid != first]
    assert len(helpers) == 1, "it holds a port, or memory"
    os.kill(first, signal.SIGKILL)
    run.wait_for_line("ended by SIGKILL .* starting it anew")
    run.wait_for_line("engine-0 ready .* after restart 1")
    assert not Path(f"/proc/{helpers[0]}").exists()


def test_when_the_restarts_are_used_up_the_run_goes_on_with_the_others(fake_run):
    run = fake_run(
        "engine-0 ready exit_after=0.5 code=7 restarts=1 peers=2",
        "engine-1 ready restarts=1 peers=2",
        "trainer ready exit_after=5",
    )
    code, output = run.wait()
    assert code == 0, output
    assert "engine-0: exit code 7; rollout.max_engine_restarts=1 are used up" in output
    assert len(pids_of(run, "engine-0")) == 2
    assert "failed" not in output


def test_without_any_engine_left_the_run_fails_with_the_first_that_ended(fake_run):
    run = fake_run(
        "engine-0 ready exit_after=1.5 code=6 restarts=1 peers=2",
        "engine-1 ready exit_after=0.2 code=7 restarts=1 peers=2",
        "trainer ready",
    )
    code, output = run.wait()
    assert code == 1
    assert "first failure: engine-1" in output
    assert "exit code 7" in output
    assert "| Fake engine-1 last words" in output
    run.assert_nothing_left(within_s=0)


def test_an_engine_without_restarts_ends_the_run(fake_run):
    run = fake_run("engine-0 ready exit_after=1 code=7 peers=2", "trainer ready")
    code, output = run.wait()
    assert code == 1
    assert "first failure: engine-0" in output


def test_an_engine_that_was_given_up_is_not_blamed_for_a_later_failure(fake_run):
    run = fake_run(
        "engine-0 ready exit_after=0.3 code=7 restarts=1 peers=2",
        "engine-1 ready restarts=1 peers=2",
        "manager ready exit_after=5 code=3",
        "trainer ready",
    )
    code, output = run.wait()
    assert code == 1
    assert "used up" in output
    assert "first failure: manager" in output


@pytest.mark.parametrize("is_frozen", [False, True])
def test_an_engine_that_does_not_answer_is_killed_and_started_anew(fake_run, is_frozen):
    run = fake_run("engine-0 ready restarts=2 ignore_term", "trainer ready")
    run.wait_for_log("engine-0", "hello")
    run.wait_for_line("trainer ready")
    (first,) = pids_of(run, "engine-0")
    if is_frozen:
        os.kill(first, signal.SIGSTOP)
    request_restart(run.run_dir, "engine-0", "3 probes failed")
    run.wait_for_line(r"engine-0: does not answer \(3 probes failed\); killing it")
    run.wait_for_line(r"engine-0: does not answer .* starting it anew in 0.3 s \(restart 1")
    run.wait_for_line("engine-0 ready .* after restart 1")
    assert not Path(f"/proc/{first}").exists()


def test_a_request_about_the_process_before_is_dropped(fake_run):
    run = fake_run("engine-0 restarts=2", "trainer ready exit_after=2")
    run.wait_for_log("engine-0", "hello")
    request_restart(run.run_dir, "engine-0", "late")
    code, output = run.wait()
    assert code == 0, output
    assert "killing it" not in output
    assert not list((run.run_dir / "status").glob("restart-*"))


def test_the_pause_doubles_up_to_its_bound():
    policy = RestartPolicy(9, backoff_s=2.0, backoff_max_s=60.0, num_peers=1)
    assert [policy.pause_s(n) for n in range(7)] == [2, 4, 8, 16, 32, 60, 60]


def test_each_request_is_handed_out_once_and_only_to_the_node_of_the_engine(tmp_path: Path):
    request_restart(tmp_path, "engine-0", "because")
    request_restart(tmp_path, "engine-10", "why not")
    assert take_restart_requests(tmp_path, ["engine-0", "engine-1"]) == {"engine-0": "because"}
    assert take_restart_requests(tmp_path, ["engine-0", "engine-1"]) == {}
    assert take_restart_requests(tmp_path / "nowhere", ["engine-0"]) == {}
    clear_restart_requests(tmp_path)
    assert take_restart_requests(tmp_path, ["engine-10"]) == {}


def test_an_engine_is_restarted_on_its_own_node_and_given_up_by_the_leader(tmp_path: Path):
    def on(index: int, *roles: str) -> FakeRun:
        environ = {"MATPO_NODE_RANK": str(index), "MATPO_NUM_NODES": "2", "MATPO_LAUNCH_ID": "one"}
        return FakeRun(tmp_path, *roles, **environ)

    leader = on(0, "engine-0 ready restarts=1 peers=2 exit_after=4 code=6", "trainer ready")
    other = on(1, "engine-1 ready restarts=1 peers=2 exit_after=1 code=7")
    code, output = leader.wait(timeout_s=40)
    assert code == 1
    assert "first failure: engine-1" in output, "both are used up, and this one was first"
    code, output = other.wait()
    assert code == 1
    assert "engine-1: exit code 7; starting it anew" in output
    assert "used up" in output
