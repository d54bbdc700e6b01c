"""Asynchronous rollout with real servers: the quickstart with `rollout.max_staleness=1`.

Proves: pushes meet generations, every token is at most one version old, those of the trained
weights agree with the trainer; a run that is killed, or preempted by signals to all of its
processes, goes on with the groups that its checkpoint holds; one whose engine is killed goes on
with the others: no question is lost or trained twice.
"""

import signal

import psutil
import pytest

from megatron_matpo.config.load import load_recipe
from megatron_matpo.data.dataset import prompts_from, read_questions
from megatron_matpo.wire import decode, recording_path
from tests.helpers.live_fleet import LiveFleet
from tests.helpers.matpo import (
    QUICKSTART,
    read_metrics,
    run_matpo,
    start_matpo,
    wait_for_step,
    wait_until_gone,
)
from tests.helpers.moving_policy import versions_of

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(900)]

STEPS, PROMPTS, SAMPLES = 6, 4, 4


def asynchronous(folder, name, *more):
    return [
        *("train", QUICKSTART, f"run.dir={folder}", f"run.name={name}", f"run.steps={STEPS}"),
        *(f"data.prompts_per_step={PROMPTS}", f"data.samples_per_prompt={SAMPLES}"),
        *("rollout.max_staleness=1", "algo.tis=truncate", *more),
    ]


def trained(run_dir):
    return [
        decode(recording_path(run_dir / "rollouts", step).read_bytes())
        for step in range(1, STEPS + 1)
    ]


def assert_each_question_once(batches, left):
    """Handed over or in flight, each once; and what the order of the data says was asked."""
    groups = [group for batch in batches for group in batch.groups] + list(left.groups)
    assert len({group.uid for group in groups}) == len(groups)
    ids = [episode.id for group in groups for episode in group.episodes]
    assert len(set(ids)) == len(ids)
    config = load_recipe(QUICKSTART, [])
    num_rows = len(read_questions(config.data.train, config.data.folder))
    asked = prompts_from(num_rows, left.next_position, config.run.seed, 0)
    assert sorted(group.row_index for group in groups) == sorted(asked)


def uids_of(batches):
    return {group.uid for batch in batches for group in batch.groups}


def in_flight(run_dir, step):
    path = run_dir / "checkpoints" / f"step_{step}" / "in_flight.rollout"
    return decode(path.read_bytes())


def test_two_versions_meet_in_a_step_and_the_present_one_agrees(tmp_path):
    done = run_matpo(*asynchronous(tmp_path, "async", "checkpoint.every=2"))
    assert done.returncode == 0, done.stdout
    run_dir = tmp_path / "async"
    batches, lines = trained(run_dir), read_metrics(run_dir)
    for batch in batches:
        assert versions_of(batch) <= {batch.policy_version, batch.policy_version - 1}
        assert len(batch.groups) == PROMPTS
        assert all(len(group.episodes) == SAMPLES for group in batch.groups)
    assert any(len(versions_of(batch)) == 2 for batch in batches)
    assert sum(line["rollout/continued_generations"] for line in lines) > 0
    for line in lines:
        assert line["rollout/staleness_max"] <= 1
        assert line["rollout/failed"] == 0
        assert line.get("mismatch/current", line["mismatch/abs_logprob"]) < 1e-4
    assert_each_question_once(batches, in_flight(run_dir, STEPS))
    assert wait_until_gone(run_dir) == []


def test_a_run_whose_manager_is_killed_stops_with_its_name_and_goes_on_with_what_was_in_flight(
    tmp_path,
):
    command = asynchronous(
        tmp_path, "killed", "checkpoint.every=2", "checkpoint.asynchronous=false"
    )
    run_dir, log = tmp_path / "killed", tmp_path / "out.log"
    process = start_matpo(*command, log=log)
    wait_for_step(run_dir, 3, timeout_s=240)
    LiveFleet(run_dir).engine_or_manager().kill()
    assert process.wait(timeout=60) == 1
    assert "ended by SIGKILL" in log.read_text() and "manager" in log.read_text()
    assert wait_until_gone(run_dir) == []
    saved = in_flight(run_dir, 2)
    assert len(saved.groups) == PROMPTS
    done = run_matpo(*command)
    assert done.returncode == 0, done.stdout
    assert "4 groups were in flight" in (run_dir / "logs" / "manager.log").read_text()
    batches = trained(run_dir)
    assert_each_question_once(batches, in_flight(run_dir, STEPS))
    assert {group.uid for group in saved.groups} <= uids_of(batches[2:]), "they went on"
    finished = {e.id: e for group in saved.groups for e in group.episodes}
    again = {e.id: e for b in batches for group in b.groups for e in group.episodes}
    for identity, episode in finished.items():
        assert again[identity].planner == episode.planner, "it was not sampled again"


def test_a_run_that_a_scheduler_preempts_has_what_was_in_flight_in_its_checkpoint(tmp_path):
    command = asynchronous(tmp_path, "preempted", "checkpoint.every=0", "run.save_on_stop=true")
    run_dir, log = tmp_path / "preempted", tmp_path / "out.log"
    process = start_matpo(*command, log=log)
    wait_for_step(run_dir, 2, timeout_s=240)
    # As Slurm does: the signal goes to all processes of the job step at once.
    for victim in [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]:
        victim.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75, log.read_text()
    assert wait_until_gone(run_dir) == []
    step = int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert 2 <= step < STEPS
    saved = in_flight(run_dir, step)
    assert saved.groups
    done = run_matpo(*command)
    assert done.returncode == 0, done.stdout
    batches = trained(run_dir)
    assert_each_question_once(batches, in_flight(run_dir, STEPS))
    assert {group.uid for group in saved.groups} <= uids_of(batches[step:]), "they went on"


def test_a_killed_engine_costs_no_episode_of_a_run_ahead(tmp_path):
    more = ("rollout.num_servers=2", "rollout.restart_backoff_s=0.5")
    command = asynchronous(tmp_path, "engine", "checkpoint.every=2", *more)
    run_dir, log = tmp_path / "engine", tmp_path / "out.log"
    process = start_matpo(*command, log=log)
    wait_for_step(run_dir, 2, timeout_s=240)
    LiveFleet(run_dir).engine(0).kill()
    assert process.wait(timeout=400) == 0, log.read_text()
    assert "ended by SIGKILL" in log.read_text()
    assert wait_until_gone(run_dir) == []
    batches = trained(run_dir)
    for batch in batches:
        assert versions_of(batch) <= {batch.policy_version, batch.policy_version - 1}
        assert not [e.failure for group in batch.groups for e in group.episodes if e.failure]
    assert_each_question_once(batches, in_flight(run_dir, STEPS))
