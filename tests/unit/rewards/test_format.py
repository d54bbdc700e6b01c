"""Proves the format reward and its combination, from a turn's text on, in both modes of `compat`.

The reference figures are those that the original's own code gives on such input: no call 1, a
block that is wrong 0, two of three blocks 0.667; rewards of 0.95, 1.0, 0.05, 0.10 and 0.9375.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from megatron_matpo.agents.formats import GRAMMARS
from megatron_matpo.agents.grammar import format_score, refuse_surplus
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.root import Config
from megatron_matpo.rewards.combine import reference_format
from megatron_matpo.rewards.scorer import Scorer
from megatron_matpo.types import CallRecord, Role, Status, Trajectory
from tests.helpers.rollouts import FakeToolBox, call, make_config, search

TOOLS = FakeToolBox().specs()
GOOD = search("who")
NATIVE = '<tool_call>\n{"name": "search", "arguments": {"q": "who"}}\n</tool_call>'
BAD_JSON = GOOD.replace('{"q": "who"}', '{"q": who}')
MAX_CALLS = 3


def played(*turns: str, role: Role = Role.PLANNER) -> Trajectory:
    """A trajectory with the calls that the grammar finds in `turns`."""
    calls = [
        CallRecord(index, found.server, found.tool, found.outcome)
        for index, text in enumerate(turns)
        for found in refuse_surplus(GRAMMARS["mcp_xml"].parse(text, TOOLS), MAX_CALLS)
    ]
    score = format_score(item.outcome for item in calls)
    return Trajectory("t", role, "a", "", 0, (), Status.ANSWERED, score, tuple(calls))


@pytest.mark.parametrize(
    ("text", "reference", "corrected"),
    [
        ("It is Ada.", 1.0, 1.0),
        (search("who", closed=False), 1.0, 0.0),
        (NATIVE, 1.0, 0.0),
        (f"<think>{GOOD}</think>Ada", 1.0, 1.0),
        (GOOD, 1.0, 1.0),
        (BAD_JSON, 0.0, 0.0),
        (call("calc", "search", q="who"), 0.0, 0.0),  # wrong server
        (call("web", "buy", q="who"), 0.0, 0.0),  # no such tool
        (call("web", "search", q="who", page="2"), 0.0, 0.0),  # extra argument
        (call("web", "search", num=3), 0.0, 0.0),  # missing argument
        (call("web", "search", q=3), 0.0, 0.0),  # mistyped argument
        (GOOD + BAD_JSON + GOOD, 2 / 3, 2 / 3),
        (GOOD + NATIVE + BAD_JSON, 1 / 2, 1 / 3),
        (GOOD * 4, 1.0, 3 / 4),  # beyond the bound, which the original does not have
        (GOOD * 3 + BAD_JSON, 3 / 4, 3 / 4),
        (f"<use_mcp_tool>{GOOD}</use_mcp_tool>", 0.0, 0.0),
    ],
)
def test_score_of_one_trajectory(text: str, reference: float, corrected: float) -> None:
    trajectory = played(text)
    assert trajectory.format_score == pytest.approx(corrected)
    assert reference_format([trajectory], can_delegate=False) == pytest.approx(reference)


BROKEN, HALF = [BAD_JSON], [GOOD, BAD_JSON]


@pytest.mark.parametrize(
    ("answer", "planner", "workers", "reference", "corrected"),
    [
        ("Ada", [GOOD], [], 0.95, 1.0),
        ("Ada", [GOOD], [[GOOD]], 1.0, 1.0),
        ("Bob", [GOOD], [], 0.05, 0.10),
        ("Bob", [GOOD], [[GOOD]], 0.10, 0.10),
        ("Ada", BROKEN, [HALF, [GOOD]], 0.9375, 0.95),
        ("Ada", [GOOD], [BROKEN, [NATIVE]], 0.9 + 0.05 * 1.5, 0.9 + 0.1 / 3),
    ],
)
def test_reward_of_a_planner_with_workers(
    answer: str,
    planner: list[str],
    workers: list[list[str]],
    reference: float,
    corrected: float,
) -> None:
    tree = [played(*planner), *(played(*turns, role=Role.WORKER) for turns in workers)]
    config = make_config()
    assert total(config, answer, tree) == pytest.approx(corrected)
    assert total(replace(config, compat="reference"), answer, tree) == pytest.approx(reference)


@pytest.mark.parametrize(
    ("share", "workers", "expected"),
    [
        (-1.0, [HALF, [GOOD]], (0.0 + 0.5 + 1.0) / 3),
        (0.0, [HALF, [GOOD]], 0.0),
        (0.2, [HALF, [GOOD]], 0.2 * 0.75),
        (1.0, [HALF, [GOOD]], 0.75),
        (0.2, [], 0.0),
    ],
)
def test_the_share_of_workers_in_the_format_score(
    share: float, workers: list[list[str]], expected: float
) -> None:
    tree = [played(*BROKEN), *(played(*turns, role=Role.WORKER) for turns in workers)]
    config = make_config()
    config = replace(config, reward=replace(config.reward, worker_format_share=share))
    assert total(config, "Bob", tree) == pytest.approx(0.1 * expected)


@pytest.mark.parametrize("compat", ["corrected", "reference"])
@pytest.mark.parametrize(
    ("answer", "turns", "expected"),
    [("Ada", [GOOD], 1.0), ("Bob", [GOOD], 0.1), ("Bob", BROKEN, 0.0), ("Ada", HALF, 0.95)],
)
def test_reward_of_a_single_agent(
    compat: str, answer: str, turns: list[str], expected: float
) -> None:
    agents = {"planner": AgentConfig(role="planner", tools=["web"]), "browser": AgentConfig()}
    config = replace(make_config(), compat=compat, agents=agents)
    assert total(config, answer, [played(*turns)]) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "expected"), [("Ada", 0.95), ("Bob", 0.0)])
def test_the_gate_holds_in_reference_mode_too(answer: str, expected: float) -> None:
    config = make_config()
    config = replace(config, compat="reference", reward=replace(config.reward, gate_format=True))
    assert total(config, answer, [played(GOOD)]) == pytest.approx(expected)


def total(config: Config, answer: str, tree: list[Trajectory]) -> float:
    score = asyncio.run(Scorer(config).score("Who?", f"\\boxed{{{answer}}}", "Ada", tree))
    assert score.reward is not None
    return score.reward.total
