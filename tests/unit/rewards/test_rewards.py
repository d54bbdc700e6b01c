"""Proves extraction, the graders and the combination, by tables."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import replace
from typing import Any

import pytest

from megatron_matpo.config.reward import JudgeConfig, RewardConfig
from megatron_matpo.config.root import Config
from megatron_matpo.errors import ConfigError
from megatron_matpo.rewards.answer import extract_answer
from megatron_matpo.rewards.combine import combine, episode_format
from megatron_matpo.rewards.graders import grader, normalize
from megatron_matpo.rewards.judge import Judge
from megatron_matpo.rewards.scorer import Score, Scorer
from megatron_matpo.types import Reward, Role, Status, Trajectory
from tests.helpers.fake_judge import FakeJudge
from tests.helpers.rollouts import make_config


def trajectory(format_score: float, role: Role = Role.WORKER) -> Trajectory:
    return Trajectory("t", role, "a", "", 0, (), Status.ANSWERED, format_score)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("no box", None),
        (r"It is \boxed{Ada}.", "Ada"),
        (r"\boxed{ Ada }", "Ada"),
        (r"\boxed{a} then \boxed{b}", "b"),
        (r"\boxed{\text{a_{b}}}", r"\text{a_{b}}"),
        (r"\boxed{\frac{1}{\sqrt{x_{2}}}}", r"\frac{1}{\sqrt{x_{2}}}"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{}", ""),
        (r"\boxed{a} and \boxed{unfinished", "a"),
        (r"\boxed{unfinished \boxed{b}", "b"),
        (r"\boxed{\boxed{a}}", "a"),
        (r"} \boxed{a}", "a"),
        (r"{ \boxed{a}", "a"),
        ("\\boxed{two\nlines}", "two\nlines"),
        (r"boxed{a}", None),
        (r"\\boxed{a}", "a"),
        (r"\\\\\boxed{a}", "a"),
    ],
)
def test_extract(said: str, expected: str | None) -> None:
    assert extract_answer(said) == expected


def test_extract_takes_linear_time() -> None:
    start = time.process_time()
    assert extract_answer("\\boxed{" * 50_000) is None
    assert extract_answer("\\" * 500_000) is None
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("name", "answer", "truth", "expected"),
    [
        ("exact_match", "Ada Lovelace", "ada lovelace", 1.0),
        ("exact_match", "The Ada-Lovelace!", "Ada Lovelace", 1.0),
        ("exact_match", r"\text{Ada}", "Ada", 1.0),
        ("exact_match", "ﬁne", "fine", 1.0),
        ("exact_match", "Ada", "Bob", 0.0),
        ("exact_match", "A", "The", 0.0),
        ("exact_match", "+", "-", 0.0),
        ("exact_match", "-5", "5", 0.0),
        ("exact_match", "-5", "\u22125", 1.0),
        ("exact_match", "1990-1995", "1990 1995", 1.0),
        ("exact_match", "1,000", "1000", 0.0),
        ("f1", "Ada Lovelace of London", "Ada Lovelace", 2 * 2 / 6),
        ("f1", "Bob", "Ada", 0.0),
        ("f1", "ada ada", "ada", 2 / 3),
        ("numeric", "1,000 km", "1000", 1.0),
        ("numeric", "3.14", "3.1400000001", 1.0),
        ("numeric", "3.14", "3.15", 0.0),
        ("numeric", "between 3 and 4", "3", 0.0),
        ("numeric", "none", "3", 0.0),
        ("numeric", "-2e3", "\u22122000", 1.0),
        ("numeric", "0", "0.0", 1.0),
        ("gaia", "1,000", "1000", 1.0),
        ("gaia", "$17.50", "17.5", 1.0),
        ("gaia", "about 17", "17", 0.0),
        ("gaia", "89", "89.0", 1.0),
        ("gaia", "Ada Lovelace!", "ada lovelace", 1.0),
        ("gaia", "seagull", "sea gull", 1.0),
        ("gaia", "the gull", "gull", 0.0),
        ("gaia", "a, b ,C", "A,b,c", 1.0),
        ("gaia", "b, a", "a, b", 0.0),
        ("gaia", "a, b, c", "a, b", 0.0),
        ("gaia", "3; 5%", "3.0; 5", 1.0),
        ("gaia", "3, four", "3, 4", 0.0),
        ("gaia", "nan", "NaN", 1.0),
    ],
)
def test_graders(name: str, answer: str, truth: str, expected: float) -> None:
    assert grader(name)(answer, truth) == pytest.approx(expected)


def test_normalize_keeps_something() -> None:
    assert normalize("the") == "the" and normalize(" ?! ") == "?!"


def test_unknown_grader() -> None:
    with pytest.raises(ConfigError, match=r"reward\.grader=oracle"):
        grader("oracle")


@pytest.mark.parametrize(
    ("accuracy", "planner", "workers", "gate", "total"),
    [
        (1.0, 1.0, [], False, 1.0),  # MATPO original: 0.95, it charges for not delegating
        (1.0, 1.0, [1.0], False, 1.0),
        (0.0, 1.0, [], False, 0.1),
        (0.0, 1.0, [1.0], False, 0.1),
        (1.0, 0.0, [0.5, 1.0], False, 0.9 + 0.1 * 0.5),
        (0.0, 1.0, [], True, 0.0),
        (0.5, 1.0, [], True, 0.45),
        (1.0, 0.5, [], True, 0.95),
    ],
)
def test_total(
    accuracy: float, planner: float, workers: list[float], gate: bool, total: float
) -> None:
    items = [trajectory(planner, Role.PLANNER), *map(trajectory, workers)]
    reward = combine(accuracy, episode_format(items), RewardConfig(gate_format=gate))
    assert reward.total == pytest.approx(total)
    assert reward.accuracy == accuracy


def test_the_order_of_workers_does_not_change_a_bit_of_the_reward() -> None:
    planner = trajectory(1.0, Role.PLANNER)
    workers = (0.0, 1 / 6, 2 / 7)
    orders = list(itertools.permutations(workers))
    assert len({sum([1.0, *order]) for order in orders}) == 2, "a plain sum does"
    assert len({episode_format([planner, *map(trajectory, order)]) for order in orders}) == 1


def test_equal_means_over_other_numbers_of_trajectories_are_equal_to_the_last_bit() -> None:
    alone = [trajectory(3 / 5, Role.PLANNER)]
    with_worker = [trajectory(2 / 5, Role.PLANNER), trajectory(4 / 5)]
    assert (2 / 5 + 4 / 5) / 2 != 3 / 5, "a plain mean does not"
    assert episode_format(with_worker) == episode_format(alone)


def score(scorer: Scorer, said: str) -> Score:
    items = [trajectory(1.0, Role.PLANNER)]
    return asyncio.run(scorer.score("Who?", said, "ada", items))


def test_scorer_reads_only_what_the_planner_said() -> None:
    scorer = Scorer(make_config())
    assert score(scorer, r"It is \boxed{Ada}").answer == "Ada"
    found = score(scorer, "I do not know")
    assert found.answer == "" and found.reward == Reward(0.0, 1.0, 0.1)
    found = score(scorer, r"\boxed{}")
    assert found.reward is not None and found.reward.accuracy == 0.0
    assert scorer.metrics() == {}


def judged_config(**settings: Any) -> Config:
    config = make_config()
    judge = JudgeConfig(api_key_env="", backoff_s=0.0, **settings)
    return replace(config, reward=RewardConfig(grader="judge", judge=judge))


@pytest.mark.parametrize(
    ("reply", "accuracy", "verdict"),
    [("A", 1.0, "correct"), ("B", 0.0, "incorrect"), ("C", 0.0, "not_attempted")],
)
def test_a_verdict_becomes_accuracy_and_no_answer_asks_nobody(
    reply: str, accuracy: float, verdict: str
) -> None:
    async def main() -> None:
        async with FakeJudge(reply) as fake:
            config = judged_config(base_url=fake.base_url)
            async with Judge(config.reward.judge) as judge:
                scorer = Scorer(config, judge)
                items = [trajectory(0.5, Role.PLANNER)]
                found = await scorer.score("Who?", r"\boxed{Ada}", "ada", items)
                assert found.reward == Reward(accuracy, 0.5, 0.9 * accuracy + 0.05, verdict)
                for said in ("I do not know", r"\boxed{ }", r"\boxed{unfinished"):
                    nothing = await scorer.score("Who?", said, "ada", items)
                    assert nothing.reward == Reward(0.0, 0.5, 0.05)
                assert len(fake.prompts) == 1 and scorer.metrics()["judge/calls"] == 1

    asyncio.run(main())


def test_a_judge_that_was_not_opened_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward\.grader=judge"):
        Scorer(judged_config())
