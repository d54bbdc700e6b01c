"""Proves each agent's own limits, and that a spent context keeps the newest evidence.

The engine and the tools are fakes; the tokenizer is real but has one token per byte, so that sizes
in tokens can be read off the texts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_matpo.agents.evidence import fair_shares, fit_replies
from megatron_matpo.types import Status, Trajectory, TurnKind
from tests.helpers.play import AGENTS, LIMITS, ROLLOUT, SINGLE, by_role, play, write_call
from tests.helpers.rollouts import (
    CHATML,
    LLAMA3,
    MISTRAL,
    FakeToolBox,
    delegate,
    make_chat,
    search,
)

PLANNER = SINGLE["planner"]
REQUEST = "you MUST NOT use any tool"


class LongTools(FakeToolBox):
    """Answers a query that is a number with so many characters: "b" for many, "a" for few."""

    async def call(self, server, tool, arguments):  # type: ignore[no-untyped-def]
        reply = await super().call(server, tool, arguments)
        size = int(arguments["q"])
        return replace(reply, text=("b" if size > 100 else "a") * size)


def summariser(*turns: str):  # type: ignore[no-untyped-def]
    def script(conversation: str, turn: int, text: str) -> str:
        return "# Final Response: s" if REQUEST in text else turns[turn]

    return script


def assert_append_only(item: Trajectory, contexts: Sequence[tuple[str, list[int]]]) -> None:
    seen: list[int] = []
    for name, context in contexts:
        if name == item.id:
            assert context[: len(seen)] == seen
            seen = context
    assert item.token_ids[: len(seen)] == seen


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL])
@pytest.mark.parametrize("call_format", ["mcp_xml", "tool_call"])
def test_overflow_keeps_the_newest_evidence_for_the_summary(
    template: str, call_format: str
) -> None:
    """Two replies too many: the short one stays whole, the long one is cut, the summary follows."""
    calls = [write_call(call_format, "web", "search", q=size) for size in ("50", "9000")]
    agents = {"planner": replace(PLANNER, final_summary="on_overflow", summary_reserve_tokens=1200)}
    limits = replace(LIMITS, context_tokens=3000)
    rollout = replace(ROLLOUT, call_format=call_format)
    tree, engine, _ = play(
        summariser("".join(calls)), agents, LongTools(), template, limits, rollout=rollout
    )
    assert tree.planner.status is Status.OVERFLOW
    assert [turn.kind for turn in tree.planner.turns] == [
        TurnKind.PROMPT,
        TurnKind.MODEL,
        TurnKind.ENVIRONMENT,
        TurnKind.MODEL,
    ]
    said = tree.planner.turns[2].text
    num_shown = said.count("b")
    mark = f"\n[... cut: {said[: said.index('[... cut')].count('b')} of 9000 characters shown]"
    assert "a" * 50 in said and mark in said
    assert said.index("a" * 50) < said.index(mark) < said.index("[SYSTEM]") < said.index(REQUEST)
    assert num_shown > 900 and "You ran out of context" in said
    assert tree.said == "# Final Response: s"
    assert tree.planner.num_tokens <= 3000 - 1
    # All that was free is used, but for a few tokens, and the reserve is the summary's.
    request = len(said[said.index("[SYSTEM]") :].encode())
    assert 1200 - request - 80 <= engine.max_tokens[1] <= 1200
    assert_append_only(tree.planner, engine.contexts)


def test_without_room_or_without_a_summary_the_replies_are_left_out() -> None:
    for wanted in ("never", "on_overflow"):
        agents = {"planner": replace(PLANNER, final_summary=wanted, summary_reserve_tokens=1200)}
        room = 1250 if wanted == "on_overflow" else 100
        prompt = len(play(lambda *_: "x", SINGLE)[0].planner.turns[0].token_ids)
        size = prompt + len(search("9000")) + 1 + room + 1
        limits = replace(LIMITS, context_tokens=size)
        tree, _, _ = play(summariser(search("9000")), agents, LongTools(), limits=limits)
        assert tree.planner.status is Status.OVERFLOW
        assert "b" * 9 not in "".join(turn.text for turn in tree.planner.turns)
        assert (REQUEST in tree.planner.turns[-2].text) == (wanted == "on_overflow")


def test_an_agent_has_a_context_of_its_own() -> None:
    agents = {
        "planner": AGENTS["planner"],
        "browser": replace(AGENTS["browser"], context_length=4500, tools=["web"]),
    }
    turns = by_role([delegate("a"), "done"], [search("9000"), "report"])
    tree, engine, _ = play(turns, agents, LongTools(), limits=replace(LIMITS, context_tokens=20000))
    assert tree.workers[0].status is Status.OVERFLOW and tree.workers[0].num_tokens < 4500
    assert tree.planner.status is Status.ANSWERED
    prompt = len(tree.workers[0].turns[0].token_ids)
    assert engine.max_tokens[1] == min(4096, 4500 - 1 - prompt)


@pytest.mark.parametrize("wanted", ["never", "on_overflow", "always"])
def test_time_of_an_agent_ends_its_turns_but_not_the_episode(wanted: str) -> None:
    """Over after the first turn: its calls are not run, a summary is still written."""
    agents = {
        "planner": replace(
            PLANNER, timeout_s=1e-9, final_summary=wanted, summary_reserve_tokens=1500
        )
    }
    tree, _, tools = play(summariser(search("x"), search("y")), agents)
    assert tree.planner.status is Status.TIME_LIMIT and tree.planner.error == ""
    assert tools.seen == []
    assert tree.planner.num_model_turns == (1 if wanted == "never" else 2)
    if wanted != "never":
        assert "You ran out of time" in tree.planner.turns[2].text
        assert tree.said == "# Final Response: s"


class LateTools(FakeToolBox):
    """Answers, and lets the clock go on by 1,000 s."""

    skipped_s = 0.0

    async def call(self, server, tool, arguments):  # type: ignore[no-untyped-def]
        self.skipped_s += 1000.0
        return await super().call(server, tool, arguments)


@pytest.fixture
def late_tools(monkeypatch: pytest.MonkeyPatch) -> LateTools:
    tools, monotonic = LateTools(), time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + tools.skipped_s)
    return tools


PATIENT = replace(LIMITS, timeout_s=1e6)


def test_replies_that_came_too_late_are_still_read_by_the_summary(late_tools: LateTools) -> None:
    agents = {
        "planner": replace(
            PLANNER, timeout_s=500.0, final_summary="on_overflow", summary_reserve_tokens=1500
        )
    }
    tree, engine, _ = play(summariser(search("x")), agents, late_tools, limits=PATIENT)
    assert tree.planner.status is Status.TIME_LIMIT
    assert tree.planner.num_model_turns == 2
    said = tree.planner.turns[2].text
    assert said.index('search says {"q": "x"}') < said.index(REQUEST)
    assert_append_only(tree.planner, engine.contexts)


def test_a_workers_time_is_over_with_its_planners(late_tools: LateTools) -> None:
    agents = {"planner": replace(AGENTS["planner"], timeout_s=500.0), "browser": AGENTS["browser"]}
    turns = by_role([delegate("a"), "never asked"], [search("x"), "never asked"])
    tree, _, _ = play(turns, agents, late_tools, limits=PATIENT)
    assert [tree.workers[0].status, tree.planner.status] == [Status.TIME_LIMIT] * 2
    assert [tree.workers[0].num_model_turns, tree.planner.num_model_turns] == [1, 1]


def test_a_workers_time_leaves_its_planner_alone() -> None:
    agents = {"planner": AGENTS["planner"], "browser": replace(AGENTS["browser"], timeout_s=1e-9)}
    tree, _, _ = play(by_role([delegate("a"), "done"], [search("x"), "never asked"]), agents)
    assert tree.workers[0].status is Status.TIME_LIMIT
    assert tree.planner.status is Status.ANSWERED
    assert "The worker ended without a report (time_limit)." in tree.planner.turns[2].text


def test_a_summary_may_use_its_whole_reserve() -> None:
    """The limit of ordinary turns does not bind it, and neither does the reserve when idle."""
    agents = {
        "planner": replace(
            PLANNER, final_summary="always", summary_reserve_tokens=2000, max_tokens_per_turn=40
        )
    }
    _, engine, _ = play(summariser("plain"), agents, limits=replace(LIMITS, context_tokens=9000))
    assert engine.max_tokens == [40, 2000]
    _, engine, _ = play(summariser("x" * 50), agents, limits=replace(LIMITS, context_tokens=2200))
    prompt, cut, request = _sizes(agents, 2200)
    assert engine.max_tokens[1] == 2200 - 1 - prompt - cut - request


def _sizes(agents, context_tokens: int) -> tuple[int, ...]:  # type: ignore[no-untyped-def]
    limits = replace(LIMITS, context_tokens=context_tokens)
    tree, _, _ = play(summariser("x" * 50), agents, limits=limits)
    return tuple(len(turn.token_ids) for turn in tree.planner.turns[:3])


def test_automatic_summaries_follow_the_role() -> None:
    agents = {
        name: replace(agent, final_summary="auto", summary_reserve_tokens=1500)
        for name, agent in AGENTS.items()
    }
    tree, _, _ = play(summariser(delegate("a"), "done"), agents)
    assert tree.planner.status is Status.ANSWERED and tree.said == "done"
    (worker,) = tree.workers
    assert worker.status is Status.ANSWERED and REQUEST in worker.turns[-2].text
    assert "# Final Response: s" in tree.planner.turns[2].text


@pytest.mark.parametrize(
    ("sizes", "budget", "shares"),
    [
        ([5, 100, 100], 105, [5, 50, 50]),
        ([100, 5, 20], 60, [35, 5, 20]),
        ([10, 10], 100, [10, 10]),
        ([7, 8, 9], -3, [0, 0, 0]),
        ([], 5, []),
    ],
)
def test_shares_are_fair(sizes: list[int], budget: int, shares: list[int]) -> None:
    assert fair_shares(sizes, budget) == shares


@pytest.mark.parametrize("template", [CHATML, MISTRAL])
@pytest.mark.parametrize("letter", ["x", "ü", "中", "😀", "<|im_end|>", "\ud800"])
def test_what_is_kept_fits_and_ends_at_a_character(template: str, letter: str) -> None:
    chat = make_chat(template)

    def num_tokens(replies: Sequence[str]) -> int:
        return len(chat.environment_ids(replies, [])[0])

    replies = [letter * 700, "short", letter * 900]
    for room in (10**6, 1000, 500, 300, 250, 100, 0, -5):
        kept = fit_replies(replies, room, num_tokens, chat)
        if room >= num_tokens(replies):
            assert kept == replies
        elif kept:
            assert num_tokens(kept) <= room
            assert kept[1] == "short"
            assert all("[... cut: " in kept[index] for index in (0, 2))
            shown = kept[2].partition("\n[")[0]
            assert chat.harmless(replies[2]).startswith(shown) and len(shown) > 3
        else:
            assert room <= 500
