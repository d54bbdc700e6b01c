"""Proves what a judge's faults do to a step: verdicts are asked again, episodes left out, counted.

Engine and judge are fakes; the judge is a real HTTP server. That the rest of a step's failures are
handled is in `test_collect.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_matpo.config.reward import JudgeConfig, RewardConfig
from megatron_matpo.errors import RolloutError
from megatron_matpo.obs import metrics as registry
from megatron_matpo.rewards.judge import Judge
from megatron_matpo.rewards.scorer import Scorer
from megatron_matpo.rollout import scheduler
from megatron_matpo.rollout.collect import RolloutManager
from megatron_matpo.types import RolloutBatch, Status
from tests.helpers.fake_judge import KEY, FakeJudge
from tests.helpers.fake_judge import Script as JudgeScript
from tests.helpers.rollouts import (
    FakeEngine,
    FakeToolBox,
    Script,
    make_chat,
    make_config,
    make_question,
)

QUESTIONS = {"train": [make_question(f"Who is {i}?") for i in range(4)]}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "RETRY_PAUSE_S", 0.0)
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)


def sample_names_itself(conversation: str, turn: int, text: str) -> str:
    """Each episode has an answer of its own, `sample GROUP.SAMPLE`."""
    return f"\\boxed{{sample {conversation.removeprefix('train-1-').removesuffix('.p')}}}"


async def _step(
    judge_script: JudgeScript | str,
    use: Callable[[RolloutManager, FakeEngine, FakeJudge], Any],
    script: Script,
    rollout: dict[str, Any],
    settings: dict[str, Any],
) -> Any:
    async with FakeJudge(judge_script) as fake:
        judge_config = JudgeConfig(
            **{
                "base_url": fake.base_url,
                "api_key_env": "TEST_JUDGE_KEY",
                "backoff_s": 0.0,
                "max_attempts": 2,
                **settings,
            }
        )
        config = replace(
            make_config(**rollout), reward=RewardConfig(grader="judge", judge=judge_config)
        )
        engine = FakeEngine(script)
        async with Judge(judge_config) as judge:
            manager = RolloutManager(
                config, lambda version: engine, FakeToolBox(), make_chat(), QUESTIONS, judge
            )
            result = await use(manager, engine, fake)
        for _ in range(200):
            if not fake.num_open:
                break
            await asyncio.sleep(0.01)
        assert fake.num_open == 0, "a request that nobody waits for was left behind"
    assert asyncio.all_tasks() == {asyncio.current_task()}, "tasks were left behind"
    return result


def step(
    judge_script: JudgeScript | str,
    use: Callable[[RolloutManager, FakeEngine, FakeJudge], Any] | None = None,
    script: Script = sample_names_itself,
    rollout: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """What `use` returns; without it, the batch of step 1, its engine and its judge."""

    async def collect(manager: RolloutManager, engine: FakeEngine, fake: FakeJudge) -> Any:
        return await manager.collect(1, 0), engine, fake

    return asyncio.run(_step(judge_script, use or collect, script, rollout or {}, settings))


def test_verdicts_become_rewards_and_metrics() -> None:
    def verdict(index: int, prompt: str) -> str:
        return "A" if "sample 0." in prompt else "C" if "sample 1.0" in prompt else "B"

    batch, _, _ = step(verdict)
    rewards = [ep.reward for group in batch.groups for ep in group.episodes]
    assert [reward.verdict for reward in rewards] == [
        *("correct", "correct", "not_attempted", "incorrect")
    ]
    assert [reward.accuracy for reward in rewards] == [1.0, 1.0, 0.0, 0.0]
    assert batch.metrics["judge/calls"] == 4 and batch.metrics["judge/failures"] == 0
    registry.check(batch.metrics, partial=True)


FAULTS = ("hang", "drip", "huge", "not_json", "no_text", "crash", "http_429", "http_500", "Hm.")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_no_episode_and_no_second_rollout(fault: str) -> None:
    failed: set[str] = set()

    def once(index: int, prompt: str) -> str:
        name = prompt.partition("Predicted answer: ")[2][:10]
        if name in failed:
            return "A"
        failed.add(name)
        return fault

    limit = 0.3 if fault in ("hang", "drip") else 20.0
    # One attempt each: it is the scheduler that asks again.
    batch, engine, fake = step(once, timeout_s=limit, max_attempts=1)
    episodes = [episode for group in batch.groups for episode in group.episodes]
    assert [episode.reward.verdict for episode in episodes] == ["correct"] * 4
    assert [episode.num_retries for episode in episodes] == [0] * 4
    assert len(engine.contexts) == 4 and len(fake.prompts) == 8
    assert batch.metrics["judge/failures"] == 4 and batch.metrics["rollout/failed"] == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_an_outage_stops_the_step_with_the_counted_reason(fault: str) -> None:
    limit = 0.1 if fault in ("hang", "drip") else 20.0
    expected = (
        r"2 of 4 episodes failed outside the model, each after 1 retries; "
        r"rollout\.max_failed_frac=0\.25 allows 1: 2 x judge_failure: no verdict in 2 attempts"
    )
    with pytest.raises(RolloutError, match=expected):
        step(fault, timeout_s=limit)


def test_an_episode_without_a_verdict_is_left_out_not_punished() -> None:
    def verdict(index: int, prompt: str) -> str:
        return "http_500" if "sample 1.0" in prompt else "A"

    batch, _, _ = step(verdict)
    left_out = batch.groups[1].episodes[0]
    assert left_out.reward is None and left_out.answer == ""
    assert left_out.failure.startswith("judge_failure: no verdict in 2 attempts")
    assert left_out.planner.status is Status.ANSWERED, "the rollout itself did not fail"
    assert batch.metrics["rollout/failed"] == 1
    assert batch.metrics["judge/failures"] == 2 and batch.metrics["judge/calls"] == 3 + 4


@pytest.mark.parametrize(
    ("fault", "reason"), [("refuse_key", "TEST_JUDGE_KEY"), ("no_model", "gpt-4o-mini")]
)
def test_a_judge_that_refuses_all_ends_the_step_at_once(fault: str, reason: str) -> None:
    async def use(manager: RolloutManager, engine: FakeEngine, fake: FakeJudge) -> int:
        with pytest.raises(RolloutError, match=reason) as caught:
            await manager.collect(1, 0)
        assert KEY not in str(caught.value)
        return len(fake.prompts)

    assert step(fault, use, rollout={"max_failed_frac": 1.0}) <= 4


def test_waiting_for_a_verdict_takes_no_other_episode_s_place() -> None:
    async def use(manager: RolloutManager, engine: FakeEngine, fake: FakeJudge) -> None:
        task = asyncio.ensure_future(manager.collect(1, 0))
        async with asyncio.timeout(20):
            while len(engine.contexts) < 4 or fake.num_open < 4:
                await asyncio.sleep(0.005)
        assert engine.max_running == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    step("hang", use, rollout={"max_concurrent_episodes": 1})


def test_a_bug_in_scoring_is_that_episode_s_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Scorer.score

    async def score(self: Scorer, question: str, said: str, *rest: Any) -> Any:
        if "sample 0.1" in said:
            raise ZeroDivisionError("bug")
        return await original(self, question, said, *rest)

    monkeypatch.setattr(Scorer, "score", score)
    batch: RolloutBatch
    batch, _, _ = step("A")
    failures = [ep.failure for group in batch.groups for ep in group.episodes]
    assert failures == ["", "internal_error: ZeroDivisionError('bug')", "", ""]
