"""Supervisors of two nodes on one machine (FakeRoles): who ends the run, and who says what."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_matpo.config.plan import Offer
from megatron_matpo.errors import ConfigError, DeadlineError, MatpoError
from megatron_matpo.launch import meeting as meeting_module
from megatron_matpo.launch.meeting import Meeting
from megatron_matpo.launch.nodes import Node
from megatron_matpo.launch.origin import Death
from megatron_matpo.launch.run_secrets import RunSecrets
from tests.helpers.supervised import FakeRun


def on_nodes(run_dir: Path, *roles: list[str], **environ: str) -> list[FakeRun]:
    return [
        FakeRun(
            run_dir,
            *own,
            MATPO_NODE_RANK=str(index),
            MATPO_NUM_NODES=str(len(roles)),
            MATPO_LAUNCH_ID="one",
            **environ,
        )
        for index, own in enumerate(roles)
    ]


def test_the_leader_ends_the_run_for_all(tmp_path):
    leader, other = on_nodes(
        tmp_path,
        ["manager ready", "trainer ready exit_after=3"],
        ["engine-0 ready spawn", "trainer-node-1 ready may_end exit_after=1"],
    )
    assert leader.wait()[0] == 0
    code, output = other.wait()
    assert code == 0, output
    assert "failed" not in output
    leader.assert_nothing_left()


def test_a_role_that_dies_elsewhere_is_named_by_the_leader(tmp_path):
    leader, other = on_nodes(
        tmp_path,
        ["manager ready", "trainer ready exit_after=2.3 code=1"],
        ["engine-3 ready exit_after=2 code=7"],
    )
    code, output = leader.wait()
    assert code == 1
    assert "first failure: engine-3" in output
    assert "exit code 7" in output
    assert "| Fake engine-3 last words" in output, "its log is in the shared folder"
    code, output = other.wait()
    assert code == 1
    assert "engine-3 ended; the reason is with node 0" in output
    leader.assert_nothing_left()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_node_that_vanishes_is_missed_by_the_other(tmp_path, victim):
    runs = on_nodes(tmp_path, ["trainer ready"], ["engine-0 ready"])
    for run, name in zip(runs, ("trainer", "engine-0"), strict=True):
        run.wait_for_log(name, "hello")
    # As a machine that loses its power: nothing is written, nothing is left.
    for pid in runs[victim].pids():
        os.kill(pid, signal.SIGKILL)
    code, output = runs[1 - victim].wait(timeout_s=60)
    assert code == 1
    assert f"node {victim}" in output
    assert "has not been heard of for" in output
    assert "(cluster.node_timeout_s=6)" in output


def test_a_node_that_is_told_to_stop_stops_the_run(tmp_path):
    leader, other = on_nodes(tmp_path, ["trainer ready"], ["engine-0 ready"])
    other.wait_for_log("engine-0", "hello")
    leader.wait_for_log("trainer", "hello")
    other.process.send_signal(signal.SIGTERM)
    assert other.wait()[0] == 143
    code, output = leader.wait()
    assert code == 143
    assert "SIGTERM: stopping everything" in output


def test_a_scheduler_that_signals_all_nodes_gets_a_save(tmp_path):
    runs = on_nodes(
        tmp_path,
        ["manager ready", "trainer ready saves=2"],
        ["engine-0 ready exit_after=4"],
        SAVE_TIMEOUT_S="20",
        SAVE_ON_STOP="1",
    )
    for run, name in zip(runs, ("trainer", "engine-0"), strict=True):
        run.wait_for_log(name, "hello")
    for run in runs:
        run.process.send_signal(signal.SIGTERM)
    assert [run.wait()[0] for run in runs] == [75, 75]


def meetings(run_dir: Path, count: int) -> list[Meeting]:
    return [
        Meeting(run_dir, Node(index, count, "one", f"host{index}"), node_timeout_s=60)
        for index in range(count)
    ]


def test_nodes_meet_and_the_secrets_are_nobody_elses(tmp_path):
    leader, other = meetings(tmp_path, 2)
    found: list[RunSecrets | None] = []
    threading.Timer(0.3, other.offer, (Offer("10.0.0.2", (7, 8)),)).start()
    offers = leader.gather(Offer("10.0.0.1", (5,)), timeout_s=10)
    assert offers == [Offer("10.0.0.1", (5,)), Offer("10.0.0.2", (7, 8))]
    waiting = threading.Thread(target=lambda: found.append(other.wait_for_start(10)))
    waiting.start()
    own = RunSecrets()
    leader.begin(own)
    waiting.join(timeout=10)
    assert found == [own]
    (file,) = tmp_path.glob("nodes/one/start.json")
    assert file.stat().st_mode & 0o777 == 0o600
    leader.leave(0, "")
    assert not file.exists()
    assert not any(own.run_token in path.read_text() for path in tmp_path.glob("nodes/one/*"))


def test_a_hundred_and_twenty_eight_nodes_meet_and_a_word_of_one_reaches_all(tmp_path):
    leader, *others = meetings(tmp_path, 128)
    secrets: list[RunSecrets | None] = []

    def come(meeting: Meeting) -> None:
        index = meeting.node.index
        meeting.offer(Offer(f"10.0.0.{index}", tuple(range(8 * index, 8 * index + 8))))
        secrets.append(meeting.wait_for_start(60))

    threads = [threading.Thread(target=come, args=(meeting,)) for meeting in reversed(others)]
    for thread in threads:
        thread.start()
    offers = leader.gather(Offer("10.0.0.0", ()), timeout_s=60)
    assert [offer.host for offer in offers] == [f"10.0.0.{index}" for index in range(128)]
    own = RunSecrets()
    leader.begin(own)
    for thread in threads:
        thread.join(timeout=60)
    assert secrets == [own] * 127
    others[-1].report_death(Death("engine-255", 1, 0.0))
    assert [death.name for death in leader.deaths()] == ["engine-255"]
    leader.leave(1, "engine-255 ended")
    assert {meeting.over() for meeting in others} == {1}


def test_the_leader_names_who_did_not_come(tmp_path):
    leader, *_ = meetings(tmp_path, 4)
    meetings(tmp_path, 4)[2].offer(Offer("10.0.0.3", ()))
    with pytest.raises(
        DeadlineError, match=r"node 1, 3 of 4 did not come inside run\.start_timeout_s=0\.5"
    ):
        leader.gather(Offer("10.0.0.1", ()), timeout_s=0.5)


def test_what_is_wrong_on_one_node_is_told_on_all(tmp_path):
    leader, other = meetings(tmp_path, 2)
    other.offer(Offer("10.0.0.2", ()))
    with pytest.raises(ConfigError), other.explaining():
        raise ConfigError("model.path=/m: no such folder")
    with pytest.raises(ConfigError, match=r"node 1 \(host1\): model\.path=/m: no such folder"):
        leader.gather(Offer("10.0.0.1", ()), timeout_s=10)


def test_a_leader_that_gives_up_is_not_waited_for(tmp_path):
    leader, other = meetings(tmp_path, 2)
    started = time.monotonic()
    with pytest.raises(MatpoError), leader.explaining():
        raise MatpoError("another run is using this folder")
    with pytest.raises(MatpoError, match="another run is using this folder"):
        other.wait_for_start(30)
    assert time.monotonic() - started < 10


def test_an_earlier_start_is_forgotten(tmp_path):
    old = Meeting(tmp_path, Node(0, 2, "old", "a"), node_timeout_s=60)
    old.leave(1, "failed")
    new = Meeting(tmp_path, Node(0, 2, "new", "a"), node_timeout_s=60)
    assert new.gone() is None and new.over() is None
    assert old.over() == 1, "it may still be running: the folder's lock says which one may stay"
    new.forget_earlier()
    assert [path.name for path in (tmp_path / "nodes").iterdir()] == ["new"]


def test_a_folder_that_cannot_be_written_hides_no_failure(tmp_path, monkeypatch):
    leader, other = meetings(tmp_path, 2)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(meeting_module, "write_atomic", full)
    monkeypatch.setattr(Path, "write_text", full)
    leader.report_death(Death("engine-0", 1, 0.0))
    assert leader.silent() is None
    leader.leave(1, "engine-0 ended")
    assert other.gone() is None


def test_one_node_writes_nothing(tmp_path):
    lone = Meeting(tmp_path, Node(0, 1, "local", "here"), node_timeout_s=60)
    assert lone.gather(Offer("127.0.0.1", (1,)), timeout_s=1) == [Offer("127.0.0.1", (1,))]
    lone.forget_earlier()
    lone.begin(RunSecrets())
    lone.leave(1, "why")
    assert lone.silent() is None and lone.deaths() == []
    assert list(tmp_path.iterdir()) == []
