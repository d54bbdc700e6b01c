"""Proves the line that says why a step was slow: one test for each cause, none without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from megatron_matpo.obs.spans import RECEIVE, Span
from megatron_matpo.obs.why import PhaseHistory, StepFacts, explain
from megatron_matpo.types import (
    CallRecord,
    Episode,
    Group,
    Role,
    Status,
    Trajectory,
    Turn,
    TurnKind,
)


def trajectory(turns: int, calls: Sequence[CallRecord] = (), role: Role = Role.PLANNER) -> Any:
    model = Turn(TurnKind.MODEL, (), "", (), ())
    return Trajectory(
        "t", role, "a", "", 0, (model,) * turns, Status.ANSWERED, 1.0, calls=tuple(calls)
    )


def episode(sample: int, duration_s: float, **changes: Any) -> Episode:
    calls = changes.pop("calls", ())
    workers = changes.pop("workers", ())
    planner = trajectory(changes.pop("turns", 2), calls)
    return Episode(
        f"e{sample}", "u", sample, planner, workers, None, duration_s=duration_s, **changes
    )


def groups(*episodes: Episode, size: int = 8) -> list[Group]:
    rows = [episodes[start : start + size] for start in range(0, len(episodes), size)]
    return [Group("u", "s", "q", "t", number, tuple(row)) for number, row in enumerate(rows)]


def evenly(count: int, longest_s: float) -> list[Episode]:
    return [episode(i % 8, longest_s * (i + 1) / count) for i in range(count)]


def times(
    rollout: float, train: float = 10.0, sync: float = 1.0, **more: float
) -> dict[str, float]:
    step = rollout + train + sync
    named = {"rollout": rollout, "train": train, "sync": sync, "score": 0.0, "step": step}
    return {f"time/{name}_s": value for name, value in ({"collect": rollout} | named).items()} | {
        name.replace("__", "/"): value for name, value in more.items()
    }


def test_nothing_is_said_where_nothing_stands_out() -> None:
    assert explain(StepFacts({})) == ""
    assert explain(StepFacts(times(100.0), groups(*evenly(64, 100.0)))) == ""
    usual = {"rollout": [90.0] * 5, "train": [10.0] * 5, "sync": [1.0] * 5}
    assert explain(StepFacts(times(100.0), groups(*evenly(64, 100.0)), (), usual)) == ""


def test_a_tail_names_its_longest_episode_and_tool() -> None:
    slow = episode(
        4,
        412.0,
        turns=31,
        calls=[
            CallRecord(0, "web", "google_search", "ok", duration_s=120.0),
            CallRecord(1, "web", "google_search", "ok", duration_s=100.0),
            CallRecord(1, "web", "scrape", "ok", duration_s=30.0),
            CallRecord(2, "browser", "search_and_browse", "ok", "e4.w0", 300.0),
        ],
    )
    others = evenly(253, 165.0)
    rest = [episode(0, 300.0), episode(1, 350.0)]
    # 17 groups of 8 before the group in which the slow one is the fourth.
    order = [*others[: 17 * 8 + 4], slow, *others[17 * 8 + 4 :], *rest]
    line = explain(StepFacts(times(412.0), groups(*order)))
    assert line == (
        "rollout 412 s: tail: 3 of 256 episodes took 60% of it (longest: group 17 episode 4, "
        "31 turns, tool google_search 220 s)"
    )


def test_a_tail_tells_workers_and_retries() -> None:
    worker = trajectory(5, role=Role.WORKER)
    slow = episode(7, 100.0, turns=3, workers=(worker, worker), num_retries=2)
    line = explain(StepFacts(times(100.0), groups(*evenly(7, 20.0), slow)))
    assert "longest: group 0 episode 7, 13 turns, 2 workers, 2 retries)" in line


def test_a_tail_tells_that_its_episode_failed_without_quoting_the_error() -> None:
    slow = episode(7, 100.0, failure="deadline: sk-secret was refused")
    line = explain(StepFacts(times(100.0), groups(*evenly(7, 20.0), slow)))
    assert line.endswith("(longest: group 0 episode 7, 2 turns, left out: deadline)")


def test_a_few_episodes_have_no_tail() -> None:
    assert explain(StepFacts(times(100.0), groups(episode(0, 10.0), episode(1, 100.0)))) == ""


def test_waiting_for_the_judge() -> None:
    waiting = [*evenly(63, 100.0), episode(7, 100.0, score_s=80.0)]
    metrics = times(180.0, judge__calls=64.0, judge__latency_s_mean=2.5, judge__failures=1.0)
    line = explain(StepFacts(metrics, groups(*waiting)))
    assert line == (
        "rollout 180 s: waited 80 s for the judge (64 requests, mean 2.5 s, "
        "1 verdicts did not come)"
    )
    # Scored while others still ran: nobody waited.
    early = [episode(0, 1.0, score_s=90.0), *evenly(63, 100.0)]
    assert explain(StepFacts(metrics, groups(*early))) == ""


def test_waiting_for_slots() -> None:
    late = [episode(0, 50.0, start_s=50.0) for _ in range(32)]
    facts = StepFacts(times(100.0), groups(*evenly(32, 50.0), *late), max_concurrent=32)
    assert explain(facts) == (
        "rollout 100 s: 32 of 64 episodes waited for a slot, up to 50 s "
        "(rollout.max_concurrent_episodes=32)"
    )


def test_a_tool_that_takes_most_of_the_time() -> None:
    calls = [CallRecord(0, "web", "scrape", "ok", duration_s=30.0)]
    same = [episode(0, 50.0, calls=calls) for _ in range(64)]
    assert explain(StepFacts(times(50.0), groups(*same))) == (
        "rollout 50 s: tool scrape took 60% of the episodes' time (64 calls, mean 30.0 s)"
    )


def test_rounds_of_dynamic_sampling() -> None:
    metrics = times(100.0, time__refill_s=40.0, rollout__rounds=3.0, rollout__discarded_groups=5.0)
    assert explain(StepFacts(metrics, groups(*evenly(64, 100.0)))) == (
        "rollout 100 s: dynamic sampling replaced 5 groups in 2 more rounds (40 s)"
    )


def test_handing_the_batch_over() -> None:
    metrics = times(130.0) | {"time/collect_s": 100.0}
    assert explain(StepFacts(metrics, groups(*evenly(64, 100.0)))) == (
        "rollout 130 s: 30 s to hand the batch over, after 100 s of it"
    )


def receive(engine: int, *seconds: float) -> list[Span]:
    return [Span(RECEIVE, ("", ""), 5.0, 5.0 + value, {"engine": engine}) for value in seconds]


def test_a_slow_engine() -> None:
    fast = [item for engine in (0, 1, 2) for item in receive(engine, 2.0, 2.0)]
    facts = StepFacts(times(100.0, sync=40.0), (), [*fast, *receive(3, 18.0, 20.0)])
    assert explain(facts) == "sync 40 s: engine-3 slow (38 s, the others 4 s)"
    assert explain(StepFacts(times(100.0, sync=40.0), (), fast)) == ""
    assert explain(StepFacts(times(100.0, sync=40.0), (), receive(0, 40.0))) == ""


@pytest.mark.parametrize("phase", ["rollout", "train", "sync"])
def test_a_phase_that_is_longer_than_usual(phase: str) -> None:
    before = {"rollout": [50.0] * 4, "train": [50.0] * 4, "sync": [50.0] * 4}
    lengths = {"rollout": 50.0, "train": 50.0, "sync": 50.0} | {phase: 90.0}
    assert explain(StepFacts(times(**lengths), (), (), before)) == f"{phase} 90 s: usually 50 s"
    too_few = {name: values[:2] for name, values in before.items()}
    assert explain(StepFacts(times(**lengths), (), (), too_few)) == ""


def test_the_largest_causes_come_first_and_a_phase_is_named_once() -> None:
    slow = episode(7, 100.0, score_s=30.0)
    metrics = times(130.0, train=90.0, judge__calls=8.0, judge__latency_s_mean=1.0)
    history = {"train": [50.0] * 3}
    line = explain(StepFacts(metrics, groups(*evenly(7, 20.0), slow), (), history))
    tail, train, judge = line.split("; ")
    assert tail.startswith("rollout 130 s: tail: 1 of 8")
    assert train == "train 90 s: usually 50 s"
    assert judge.startswith("waited 30 s for the judge")


def test_replayed_episodes_do_not_explain_this_run() -> None:
    """Their times were taken when they were recorded."""
    metrics = times(0.2, train=50.0) | {"time/collect_s": 100.0}
    slow = episode(7, 100.0)
    assert explain(StepFacts(metrics, groups(*evenly(7, 20.0), slow))) == ""


def test_history_is_the_last_steps_with_times() -> None:
    history = PhaseHistory()
    history.add({"step": 0.0, "eval/gaia/mean@8": 0.5})
    for step in range(20):
        history.add({"time/train_s": float(step), "time/sync_s": None})
    assert list(history.phases["train"]) == [float(step) for step in range(10, 20)]
    assert not history.phases["sync"]
