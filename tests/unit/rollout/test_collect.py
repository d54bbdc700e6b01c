"""Proves what a step is: its groups, retries, left-out episodes, bounds, metrics and recording."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_matpo import wire
from megatron_matpo.config.root import Config
from megatron_matpo.config.run import ObsConfig
from megatron_matpo.errors import (
    ConfigError,
    EngineRejected,
    EngineUnreachable,
    RolloutError,
    ToolError,
)
from megatron_matpo.obs import metrics as registry
from megatron_matpo.rollout import scheduler
from megatron_matpo.rollout.collect import RolloutManager
from megatron_matpo.types import RolloutBatch, RowAsk, Status
from tests.helpers.rollouts import (
    FakeEngine,
    FakeToolBox,
    Script,
    delegate,
    make_chat,
    make_config,
    make_question,
    search,
)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "RETRY_PAUSE_S", 0.0)


QUESTIONS = {
    "train": [make_question(f"Who is {i}?") for i in range(5)],
    "eval": [make_question(f"Which {i}?") for i in range(4)],
}


def matpo(conversation: str, turn: int, text: str) -> str:
    if conversation.endswith(".p"):
        return [delegate("find it"), "It is \\boxed{Ada}"][turn]
    return [search("it"), "Ada."][turn]


def collect(
    script: Script = matpo,
    config: Config | None = None,
    tools: FakeToolBox | None = None,
    split: str = "train",
    asks: Sequence[RowAsk] | None = None,
    step: int = 1,
    position: int = 0,
    **engine: Any,
) -> tuple[RolloutBatch, FakeEngine]:
    fake = FakeEngine(script, **engine)
    manager = RolloutManager(
        config or make_config(),
        lambda version: fake,
        tools or FakeToolBox(),
        make_chat(),
        QUESTIONS,
    )
    return asyncio.run(manager.collect(step, 0, split, asks, position)), fake


def test_a_training_step() -> None:
    batch, _ = collect(step=2)
    assert (batch.step, batch.policy_version) == (2, 0)
    assert [len(group.episodes) for group in batch.groups] == [2, 2]
    for group in batch.groups:
        assert group.question == f"Who is {group.row_index}?" and group.ground_truth == "Ada"
        for index, episode in enumerate(group.episodes):
            assert (episode.uid, episode.sample_index) == (group.uid, index)
            assert episode.reward is not None and episode.reward.total == pytest.approx(1.0)
            assert episode.answer == "Ada" and len(episode.workers) == 1
    identities = [
        item.id for group in batch.groups for ep in group.episodes for item in ep.trajectories
    ]
    assert len(set(identities)) == len(identities) == 8
    assert wire.decode(wire.encode(batch)).groups[0].uid == batch.groups[0].uid


def rows_of(batch: RolloutBatch) -> list[int]:
    return [group.row_index for group in batch.groups]


def test_two_collections_ask_the_same_questions() -> None:
    first, again = (collect(position=2)[0] for _ in range(2))
    assert rows_of(first) == rows_of(again) and first.next_position == 4
    assert len({*rows_of(collect(position=0)[0]), *rows_of(first)}) == 4


def test_evaluation_asks_the_first_rows_once() -> None:
    batch, _ = collect(split="eval", step=7)
    assert [group.question for group in batch.groups] == ["Which 0?", "Which 1?", "Which 2?"]
    assert all(len(group.episodes) == 1 for group in batch.groups)


def test_an_evaluation_can_ask_for_certain_rows() -> None:
    batch, _ = collect(split="eval", asks=[RowAsk(3, 2), RowAsk(1, 1)])
    assert [(group.row_index, len(group.episodes)) for group in batch.groups] == [(3, 2), (1, 1)]
    with pytest.raises(ConfigError, match="eval: has 4 rows, so there is no row 4"):
        collect(split="eval", asks=[RowAsk(4, 1)])


def test_who_asks_for_rows_gets_what_came_and_counts_failures_itself() -> None:
    config = make_config(max_failed_frac=0.0, max_episode_retries=0)
    broken = lambda conversation, turn, text: EngineRejected("down")  # noqa: E731
    batch, _ = collect(broken, config, split="eval", asks=[RowAsk(0, 2)])
    assert [episode.reward for episode in batch.groups[0].episodes] == [None, None]
    with pytest.raises(RolloutError):
        collect(broken, config, split="eval")


def test_concurrency_is_bounded() -> None:
    config = make_config(max_concurrent_episodes=2)
    _, engine = collect(config=config, delay_s=0.005)
    assert engine.max_running == 2


def fail_first(num_failures: int, error: BaseException) -> Script:
    """Each planner conversation fails so many times before it plays `matpo`."""
    failed: Counter[str] = Counter()

    def script(conversation: str, turn: int, text: str) -> str | BaseException:
        if conversation.endswith(".p") and failed[conversation] < num_failures:
            failed[conversation] += 1
            return error
        return matpo(conversation, turn, text)

    return script


def test_infrastructure_failures_are_retried() -> None:
    batch, _ = collect(fail_first(1, EngineUnreachable("gone")))
    episodes = [episode for group in batch.groups for episode in group.episodes]
    assert all(episode.reward is not None and episode.num_retries == 1 for episode in episodes)
    assert batch.metrics["rollout/retries"] == 4 and batch.metrics["rollout/failed"] == 0


def test_an_episode_that_keeps_failing_is_left_out_not_punished() -> None:
    def script(conversation: str, turn: int, text: str) -> str | BaseException:
        if conversation.startswith("train-1-0.1"):
            return EngineUnreachable("http://e: gone")
        return matpo(conversation, turn, text)

    batch, _ = collect(script, make_config(max_failed_frac=0.25))
    left_out = batch.groups[0].episodes[1]
    assert left_out.reward is None and left_out.num_retries == 1
    assert left_out.failure == "engine_failure: http://e: gone"
    assert left_out.planner.status is Status.ENGINE_FAILURE
    assert batch.metrics["rollout/failed_frac"] == 0.25
    assert batch.metrics["rollout/failed_by/engine_failure"] == 1
    assert batch.metrics["rollout/status/planner/answered"] == 1.0


def test_too_many_failures_end_the_step_with_counted_reasons() -> None:
    tools = FakeToolBox(failure=ToolError("web: the server is gone"))
    expected = (
        r"2 of 4 episodes failed outside the model, each after 1 retries; "
        r"rollout\.max_failed_frac=0\.25 allows 1: 2 x tool_failure: web: the server is gone"
    )
    with pytest.raises(RolloutError, match=expected):
        collect(
            lambda conversation, *_: delegate("x") if conversation.endswith(".p") else search("x"),
            make_config(max_failed_frac=0.25),
            tools,
        )


def test_deadline_is_a_failure_that_names_its_setting() -> None:
    config = make_config(episode_timeout_s=0.02, max_failed_frac=1.0, max_episode_retries=0)
    batch, _ = collect(config=config, delay_s=1.0)
    failures = {episode.failure for group in batch.groups for episode in group.episodes}
    assert failures == {"deadline: no end after 0.02 s (rollout.episode_timeout_s)"}
    assert batch.metrics["rollout/failed"] == batch.metrics["rollout/failed_by/deadline"] == 4


def test_a_bug_in_one_episode_is_counted_and_never_the_step_s() -> None:
    def policy(conversation: str, *rest: object) -> object:
        if conversation.startswith("train-1-0.0."):
            return ZeroDivisionError("bug")
        return "\\boxed{4}"

    batch, _ = collect(policy, make_config(max_failed_frac=0.25, max_episode_retries=0))
    failed = [ep for group in batch.groups for ep in group.episodes if ep.reward is None]
    assert [ep.failure for ep in failed] == ["internal_error: ZeroDivisionError('bug')"]
    assert batch.metrics["rollout/failed"] == 1


def test_a_bug_in_every_episode_stops_the_run_with_its_name() -> None:
    with pytest.raises(RolloutError, match="internal_error: ZeroDivisionError"):
        collect(lambda *_: ZeroDivisionError("bug"), make_config(max_episode_retries=0))


def test_metrics_are_registered_and_right() -> None:
    batch, _ = collect()
    values = batch.metrics
    registry.check(values, partial=True)
    items = [item for g in batch.groups for ep in g.episodes for item in ep.trajectories]
    assert values["tokens/sampled"] == sum(item.num_sampled_tokens for item in items)
    assert values["rollout/episodes"] == 4 and values["rollout/workers_per_planner"] == 1
    assert values["rollout/turns/planner"] == values["rollout/turns/worker"] == 2
    assert values["rollout/status/worker/answered"] == 1
    assert values["rollout/call_outcome/planner/ok"] == 1
    assert values["tools/calls"] == 4 and values["tools/errors"] == 0
    assert values["tokens/sampled_per_s"] > 0 and values["time/collect_s"] > 0
    assert all(isinstance(value, float | int) for value in values.values())


def test_training_steps_are_recorded_and_evaluations_are_not(tmp_path: Path) -> None:
    from dataclasses import replace

    config = replace(make_config(str(tmp_path)), obs=ObsConfig(record_rollouts=True))
    batch, _ = collect(config=config, step=12)
    collect(config=config, step=12, split="eval")
    (file,) = (tmp_path / "test" / "rollouts").iterdir()
    assert file.name == "step_000012.rollout"
    assert wire.decode(file.read_bytes()).metrics == batch.metrics


def test_settings_that_name_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.planner=boss"):
        collect(config=make_config(planner="boss"))
    with pytest.raises(
        ConfigError, match="split=test: no such questions; the manager has train, eval"
    ):
        collect(split="test")
