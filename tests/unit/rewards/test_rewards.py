"""Proves extraction, the graders and the combination, by tables."""

from __future__ import annotations

import time

import pytest

from megatron_matpo.config.reward import RewardConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.rewards.answer import extract_answer
from megatron_matpo.rewards.combine import Scorer, combine, episode_format
from megatron_matpo.rewards.graders import grader, normalize
from megatron_matpo.types import Role, Status, Trajectory


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
    ],
)
def test_extract(said: str, expected: str | None) -> None:
    assert extract_answer(said) == expected


def test_extract_takes_linear_time() -> None:
    start = time.process_time()
    assert extract_answer("\\boxed{" * 50_000) is None
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
    ],
)
def test_graders(name: str, answer: str, truth: str, expected: float) -> None:
    assert grader(name)(answer, truth) == pytest.approx(expected)


def test_normalize_keeps_something() -> None:
    assert normalize("the") == "the" and normalize(" ?! ") == "?!"


def test_unknown_grader() -> None:
    with pytest.raises(ConfigError, match=r"reward\.grader=judge"):
        grader("judge")


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


def test_scorer_reads_only_what_the_planner_said() -> None:
    scorer = Scorer(RewardConfig())
    items = [trajectory(1.0, Role.PLANNER)]
    assert scorer.score(r"It is \boxed{Ada}", "ada", items)[0] == "Ada"
    answer, reward = scorer.score("I do not know", "ada", items)
    assert (answer, reward.accuracy) == ("", 0.0)
    assert scorer.score(r"\boxed{}", "ada", items)[1].accuracy == 0.0
