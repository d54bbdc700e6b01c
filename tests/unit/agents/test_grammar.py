"""Proves how every kind of call block is classified, and that no text can raise or take long."""

from __future__ import annotations

import random
import time

import pytest

from megatron_matpo.agents.arguments import check_arguments
from megatron_matpo.agents.grammar import (
    CallOutcome,
    ParsedCall,
    format_score,
    refuse_surplus,
    visible_text,
)
from megatron_matpo.agents.tools import ToolSpec
from megatron_matpo.agents.xml_calls import XmlCalls
from tests.helpers.rollouts import FakeToolBox, call, search

XML = XmlCalls()
SPECS = FakeToolBox().specs()
GOOD = search("x")


def raw(arguments: str, server: str = "web", tool: str = "search") -> str:
    return (
        f"<use_mcp_tool>\n<server_name>{server}</server_name>\n<tool_name>{tool}</tool_name>\n"
        f"<arguments>\n{arguments}\n</arguments>\n</use_mcp_tool>"
    )


def outcomes(text: str, thinking: bool = False) -> list[str]:
    return [str(item.outcome) for item in XML.parse(text, SPECS, thinking)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 4.", []),
        (GOOD, ["ok"]),
        (f"First this. {GOOD} trailing words", ["ok"]),
        (GOOD + "\n" + call("calc", "add", a=1, b=2.5), ["ok", "ok"]),
        (raw('{"q": "x"}').replace("\n", ""), ["ok"]),
        (raw('{"q": "x"}', " web ", " search "), ["ok"]),
        (raw('{"q": "a {b} </arguments> </use_mcp_tool> <use_mcp_tool> c"}'), ["ok"]),
        (raw('{"q": "<think> is a tag"}') + GOOD, ["ok", "ok"]),
        (raw('{"q": "x", "num": 3}'), ["ok"]),
        (raw("{}"), ["missing_argument"]),
        (raw('{"q": ' + "[" * 101 + "]" * 101 + "}"), ["bad_json"]),
        (raw('{"q": "' + "[" * 500 + '"}'), ["ok"]),
        (raw('{"q": "x", "num": 1e999}'), ["bad_json"]),
        (raw('{"num": 3}'), ["missing_argument"]),
        (raw('{"q": "x", "hl": "en"}'), ["unknown_argument"]),
        (raw('{"q": 7}'), ["mistyped_argument"]),
        (raw('{"q": "x", "num": true}'), ["mistyped_argument"]),
        (raw('{"q": "x", "num": 3.5}'), ["mistyped_argument"]),
        (raw('{"q": null}'), ["mistyped_argument"]),
        (raw('["x"]'), ["not_an_object"]),
        (raw('"x"'), ["not_an_object"]),
        (raw('{"q": x}'), ["bad_json"]),
        (raw('{"q": "line\nbreak"}'), ["bad_json"]),
        (raw('{"q": NaN}'), ["bad_json"]),
        (raw('{"q": "\\ud800"}'), ["bad_json"]),
        (raw('{"q": "x"} and more'), ["bad_json"]),
        (raw("[" * 20000), ["bad_json"]),
        (raw('{"q": ' + "1" * 5000 + "}"), ["bad_json"]),
        (raw(""), ["bad_json"]),
        (raw('{"q": "x"}', "calc"), ["wrong_server"]),
        (raw('{"q": "x"}', "", "search"), ["wrong_server"]),
        (raw('{"q": "x"}', "web", "fetch"), ["unknown_tool"]),
        (raw('{"subtask": "x"}', "browser", "search_and_browse"), ["unknown_tool"]),
        (search("x", closed=False), ["unclosed"]),
        ("<use_mcp_tool>", ["unclosed"]),
        (search("x", closed=False) + GOOD, ["unclosed", "ok"]),
        ("<use_mcp_tool>\n" + GOOD, ["unclosed", "ok"]),
        (f"<use_mcp_tool>\n{GOOD}\n</use_mcp_tool>", ["nested"]),
        (f"<use_mcp_tool>\n{GOOD}\n</use_mcp_tool>{GOOD}", ["nested", "ok"]),
        ("<use_mcp_tool>search for x</use_mcp_tool>", ["malformed"]),
        (GOOD.replace("<server_name>web</server_name>\n", ""), ["malformed"]),
        (GOOD.replace("<arguments>", "please <arguments>"), ["malformed"]),
        ("</use_mcp_tool>", ["malformed"]),
        ('<tool_call>{"name": "search"}</tool_call>', ["foreign_syntax"]),
        (f"{GOOD}{raw('{}')}{GOOD}", ["ok", "missing_argument", "ok"]),
        (f"<think>{GOOD}</think>Done.", []),
        (f"<think>{GOOD}", []),
        (f"<think>hm</think>{GOOD}", ["ok"]),
        (f"{GOOD}</think>{GOOD}{GOOD}", ["ok", "ok"]),
        (f"{GOOD}<think>{search('x', closed=False)}</think>", ["ok"]),
    ],
)
def test_outcomes(text: str, expected: list[str]) -> None:
    assert outcomes(text) == expected


def test_a_prompt_that_opens_a_thought_is_known() -> None:
    assert outcomes(f"{GOOD}</think>{GOOD}", thinking=True) == ["ok"]
    assert outcomes(GOOD, thinking=True) == []


def test_arguments_and_names_are_read() -> None:
    (good,) = XML.parse(raw('{"q": "a {b}", "num": 3}'), SPECS)
    assert good == ParsedCall(CallOutcome.OK, "web", "search", {"q": "a {b}", "num": 3})
    (broken,) = XML.parse(search("x", closed=False), SPECS)
    assert (broken.server, broken.tool) == ("web", "search")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (raw('{"q": "x"}', "calc"), "belongs to the server web"),
        (raw('{"q": "x"}', "web", "fetch"), "web / search"),
        (raw('{"hl": "en"}'), "q"),
        (raw('{"q": "x", "hl": "en"}'), "hl; known: q, num"),
        (raw('{"q": 1}'), "must be string, not number"),
        (raw('{"q": x}'), "not valid JSON"),
        (search("x", closed=False), "not closed"),
    ],
)
def test_details_help_the_model(text: str, words: str) -> None:
    assert words in XML.parse(text, SPECS)[0].detail


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": ["string", "null"]}, None, "ok"),
        ({"type": ["string", "null"]}, 1, "mistyped_argument"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 2, "ok"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "2", "mistyped_argument"),
        ({"type": "integer"}, 2.0, "ok"),
        ({"type": "array"}, [1], "ok"),
        ({"type": "object"}, [1], "mistyped_argument"),
        ({"description": "anything"}, [1], "ok"),
        ({"type": "date"}, "today", "ok"),
    ],
)
def test_types(schema: dict[str, object], value: object, expected: str) -> None:
    assert check_arguments({"a": value}, {"properties": {"a": schema}})[0] == expected


def test_additional_properties_may_be_allowed() -> None:
    schema = {"properties": {}, "additionalProperties": True}
    assert check_arguments({"a": 1}, schema)[0] == CallOutcome.OK


def test_format_score_is_the_share_of_ok() -> None:
    assert format_score([]) == 1.0
    assert format_score(["ok", "ok", "bad_json"]) == pytest.approx(2 / 3)
    assert format_score(["unclosed"]) == 0.0


def test_visible_text_and_strip_calls() -> None:
    assert visible_text("<think>a</think>\n\nb") == "b"
    assert visible_text("a</think>b</think>c") == "c"
    assert visible_text("plain") == "plain"
    assert visible_text("still <think> going on") == "still "
    assert visible_text("never ends", starts_in_thinking=True) == ""
    assert XML.without_calls(f"report {GOOD} more {GOOD}") == "report  more"
    assert XML.without_calls("no end <use_mcp_tool> x") == "no end <use_mcp_tool> x"
    assert XML.without_calls(f"a {search('x </use_mcp_tool> y')} b") == "a  b"
    assert XML.without_calls("a <use_mcp_tool> broken </use_mcp_tool> b") == "a  b"


PIECES = [
    "<use_mcp_tool>", "</use_mcp_tool>", "<server_name>web</server_name>", "<server_name>",
    "<tool_name>search</tool_name>", "</tool_name>", "<arguments>", "</arguments>", '{"q": "x"}',
    '{"q": ', '"', "{", "}", "[", "\\", "<think>", "</think>", "<tool_call>", "\n", "text ",
    "\ud800", "\x00", "1e999", GOOD, search("y", closed=False), "ü中",
]  # fmt: skip


def test_fuzz_never_raises_and_scores_are_shares() -> None:
    rng = random.Random(7)
    num_ok = 0
    for _ in range(3000):
        text = "".join(rng.choices(PIECES, k=rng.randrange(25)))
        calls = XML.parse(text, SPECS, rng.random() < 0.2)
        num_ok += sum(item.outcome is CallOutcome.OK for item in calls)
        assert 0.0 <= format_score(item.outcome for item in calls) <= 1.0
        for item in calls:
            assert (item.detail == "") == (item.outcome is CallOutcome.OK)
            if item.outcome is CallOutcome.OK:
                assert item.arguments["q"] in ("x", "y")
        visible_text(text)
        XML.without_calls(text)
    assert num_ok > 300  # the fuzz reaches the good path as well


def test_appending_to_a_turn_never_changes_earlier_good_calls() -> None:
    rng = random.Random(8)
    for _ in range(500):
        tail = "".join(rng.choices([p for p in PIECES if "think" not in p], k=5))
        assert outcomes(GOOD + tail)[0] == "ok"


@pytest.mark.parametrize(
    "piece",
    [
        "<use_mcp_tool>",
        raw('{"q": "x'),
        search("x", closed=False),
        raw("{bad}"),
        "<use_mcp_tool><server_name>",
        "</use_mcp_tool>",
        "<think>",
        "{" * 50,
    ],
)
def test_time_is_linear(piece: str) -> None:
    def seconds(num_chars: int) -> float:
        text = piece * (num_chars // len(piece))
        best = 9.0
        for _ in range(3):
            start = time.process_time()
            XML.parse(text, SPECS)
            best = min(best, time.process_time() - start)
        return best

    # 8 times the text: 8 times the CPU time; 64 times if it were quadratic. 2 ms of slack.
    assert seconds(320_000) < 24 * seconds(40_000) + 0.002


def test_specs_with_odd_schemas_do_not_break_the_check() -> None:
    spec = ToolSpec("web", "search", "", {"properties": None, "required": None})
    assert [item.outcome for item in XML.parse(GOOD, [spec])] == [CallOutcome.UNKNOWN_ARGUMENT]


@pytest.mark.parametrize("required", [True, None, "q", 3])
def test_a_schema_with_a_wrong_required_does_not_stop_a_call(required: object) -> None:
    schema = {"properties": {"q": {"type": "string"}}, "required": required}
    assert check_arguments({"q": "x"}, schema) == (CallOutcome.OK, "")


def test_calls_beyond_the_limit_are_refused() -> None:
    calls = refuse_surplus(XML.parse(GOOD * 5, SPECS), 2)
    assert [call.outcome for call in calls] == ["ok", "ok", "too_many", "too_many", "too_many"]
    assert "at most 2 calls" in calls[-1].detail
    assert refuse_surplus(calls[:2], 2) == calls[:2]
