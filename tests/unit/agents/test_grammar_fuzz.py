"""Proves that no text of a model breaks a call format: 20,000 generated turns through both.

The generator is seeded; texts are truncated, nested, spliced, wrongly encoded, huge, and mixtures
of both formats and of thoughts. What is called `ok` is checked by an independent JSON Schema
validator against the schema of the very tool that would be executed.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator

import jsonschema
import pytest

from megatron_matpo.agents import blocks, prompts
from megatron_matpo.agents.formats import GRAMMARS
from megatron_matpo.agents.grammar import CallGrammar, CallOutcome, format_score, visible_text
from megatron_matpo.agents.tools import ToolSpec

NUM_TURNS = 20_000
SPECS = [
    ToolSpec(
        "web",
        "search",
        "Search.",
        {
            "type": "object",
            "properties": {
                "q": {"type": "string"},
                "num": {"type": ["integer", "null"]},
                "kind": {"enum": ["news", "web", 1]},
                "tags": {"type": "array", "items": {"type": "string"}},
                "range": {
                    "type": "object",
                    "properties": {"from": {"anyOf": [{"type": "number"}, {"type": "string"}]}},
                    "required": ["from"],
                    "additionalProperties": False,
                },
            },
            "required": ["q"],
        },
    ),
    ToolSpec("calc", "add", "Add.", {"properties": {"a": {"type": "number"}, "b": {"const": 2}}}),
    ToolSpec("free", "any", "Anything.", {"type": "object", "additionalProperties": True}),
    ToolSpec("odd", "broken_schema", "Odd.", {"properties": {"x": {"type": 3}}, "required": "x"}),
]
ORACLES = {
    (spec.server, spec.name): jsonschema.Draft202012Validator(spec.input_schema)
    for spec in SPECS
    if spec.server != "odd"  # whose schema no validator would take
}
VALUES = [
    "x", "", 0, 7, -1.5, 2, 3.0, True, False, None, [], ["a"], [1], {}, {"from": 1}, {"from": []},
    {"from": "a", "to": 1}, "news", "\u0000", "ü中😀", "</tool_call>", "</use_mcp_tool>", "<think>",
    "</think>", "{", '"', "\\", "\ud800", 1e400, [[[[1]]]], "z" * 3000,
]  # fmt: skip
NAMES = ["q", "num", "kind", "tags", "range", "a", "b", "x", "", "subtask", "name", "ü"]
JUNK = [
    "<use_mcp_tool>", "</use_mcp_tool>", "<tool_call>", "</tool_call>", "<think>", "</think>",
    "<server_name>web</server_name>", "<server_name>", "<tool_name>search</tool_name>",
    "</tool_name>", "<arguments>", "</arguments>", '{"q": "x"}', '{"q": ', '"', "{", "}", "[",
    "\\", "\n", " text ", "\ud800", "\udfff", "\x00", "\ufffd", "1e999", "\u2028", "Infinity",
    "<|im_end|>", "<|eot_id|>", "[INST]", "<tools>", "<tool_response>", "ü中😀", "\x1b[0m",
    "-" * 50, "9" * 5000, "[" * 200, '{"a":' * 150,
]  # fmt: skip


def write_call(rng: random.Random) -> str:
    """A call of either format, mostly to a tool that there is."""
    spec = rng.choice(SPECS)
    server = spec.server if rng.random() < 0.8 else rng.choice(["web", "", "nowhere"])
    tool = spec.name if rng.random() < 0.9 else rng.choice(["search", "add", "", "no such"])
    names = rng.sample(NAMES, rng.randrange(4))
    arguments = {name: rng.choice(VALUES) for name in names}
    if spec.name == "search" and rng.random() < 0.7:
        arguments["q"] = rng.choice(["x", "a {b}", "</use_mcp_tool>"])
    value = arguments if rng.random() < 0.95 else rng.choice(VALUES)
    body = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
    if rng.random() < 0.5:
        return (
            f"<use_mcp_tool>\n<server_name>{server}</server_name>\n<tool_name>{tool}</tool_name>\n"
            f"<arguments>\n{body}\n</arguments>\n</use_mcp_tool>"
        )
    return f'<tool_call>\n{{"name": {json.dumps(tool)}, "arguments": {body}}}\n</tool_call>'


def junk(rng: random.Random) -> str:
    return "".join(rng.choices(JUNK, k=rng.randrange(12)))


def truncated(rng: random.Random) -> str:
    text = write_call(rng)
    return text[: rng.randrange(len(text))]


def spliced(rng: random.Random) -> str:
    """A call with something put into it, or with a part taken out."""
    text, at = write_call(rng), rng.randrange(20, 60)
    return text[:at] + rng.choice([junk(rng), write_call(rng), ""]) + text[at + rng.randrange(9) :]


def mojibake(rng: random.Random) -> str:
    raw = bytearray(write_call(rng).encode("utf-8", "surrogatepass"))
    for _ in range(rng.randrange(1, 6)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return raw.decode(
        rng.choice(["latin-1", "cp1252", "utf-8"]), rng.choice(["replace", "surrogateescape"])
        if rng.random() < 0.8
        else "ignore",
    )  # fmt: skip


def thinking(rng: random.Random) -> str:
    inner = rng.choice([write_call, truncated, junk])(rng)
    return rng.choice([f"<think>{inner}</think>", f"<think>{inner}", f"{inner}</think>"])


def random_text(rng: random.Random) -> str:
    return "".join(chr(rng.randrange(0x11000)) for _ in range(rng.randrange(60)))


def huge(rng: random.Random) -> str:
    if rng.random() < 0.97:
        return write_call(rng)
    unit = rng.choice([write_call, truncated, junk])(rng) or "<tool_call>"
    return unit * (rng.randrange(20_000, 60_000) // len(unit))


PARTS: list[Callable[[random.Random], str]] = [
    *(write_call, write_call, write_call, junk, truncated, spliced, mojibake, thinking),
    *(random_text, huge),
]


def turns() -> Iterator[tuple[str, bool]]:
    """(text of a turn, whether the prompt opened a thought)."""
    rng = random.Random(2510)
    for _ in range(NUM_TURNS):
        text = "".join(rng.choice(PARTS)(rng) for _ in range(rng.randrange(1, 5)))
        yield text, rng.random() < 0.1


def check_turn(grammar: CallGrammar, text: str, thinks: bool) -> list[CallOutcome]:
    calls = grammar.parse(text, SPECS, thinks)
    assert calls == grammar.parse(text, SPECS, thinks)
    assert 0.0 <= format_score(call.outcome for call in calls) <= 1.0
    for call in calls:
        assert isinstance(call.outcome, CallOutcome)
        assert (call.detail == "") == (call.outcome is CallOutcome.OK)
        if call.outcome is CallOutcome.OK:
            json.dumps(call.arguments, ensure_ascii=False, allow_nan=False).encode()
            oracle = ORACLES.get((call.server, call.tool))
            assert oracle is None or oracle.is_valid(call.arguments), call
        elif len(text) < 20_000:
            assert len(prompts.correction(call, grammar)) < 30_000
    said = visible_text(text, thinks)
    report = grammar.without_calls(said)
    assert len(report) <= len(said) <= len(text)
    return [call.outcome for call in calls]


@pytest.mark.parametrize("call_format", GRAMMARS)
def test_twenty_thousand_turns(call_format: str) -> None:
    counts: Counter[str] = Counter()
    num_turns = num_without = 0
    for text, thinks in turns():
        found = check_turn(GRAMMARS[call_format], text, thinks)
        counts.update(found)
        num_turns += 1
        num_without += not found
    assert num_turns == NUM_TURNS
    # Every outcome is reached, so nothing of the above was true for want of cases.
    expected = set(CallOutcome) - {CallOutcome.TOO_MANY}
    if call_format == "tool_call":
        expected -= {CallOutcome.WRONG_SERVER}
    assert set(counts) == expected
    assert min(counts.values()) > 50, counts
    assert counts[CallOutcome.OK] > 3000 and num_without > 1000, (counts, num_without)


GOOD = {
    "mcp_xml": "<use_mcp_tool><server_name>web</server_name><tool_name>search</tool_name>"
    '<arguments>{"q": "x"}</arguments></use_mcp_tool>',
    "tool_call": '<tool_call>{"name": "search", "arguments": {"q": "x"}}</tool_call>',
}


def pieces(call_format: str) -> list[str]:
    good = GOOD[call_format]
    opened, closed = good[: good.index(">") + 1], good[good.rindex("<") :]
    return [
        *(opened, closed, f"{opened}{opened}{closed}", good, good[:-3], good.replace('"x"', "x")),
        *(good.replace('"x"', '"x'), good.replace('"x"', '"' + closed), opened + " " * 40),
        *("<think>", "</think>", "{" * 50, opened + '{"q": "' + "y" * 40, opened + "<server_name>"),
    ]


@pytest.mark.parametrize("index", range(14))
@pytest.mark.parametrize("call_format", GRAMMARS)
def test_work_grows_with_the_length_of_the_turn(
    call_format: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Characters handed to the JSON decoder, and blocks looked at: both as the text, times 8."""
    work = [0, 0]
    decode, look = blocks.decode_json, blocks.BlockScanner._block

    def counting_decode(text: str):  # type: ignore[no-untyped-def]
        work[0] += len(text)
        return decode(text)

    def counting_look(self: blocks.BlockScanner, start: int):  # type: ignore[no-untyped-def]
        work[1] += 1
        return look(self, start)

    monkeypatch.setattr(blocks, "decode_json", counting_decode)
    monkeypatch.setattr(blocks.BlockScanner, "_block", counting_look)

    def effort(num_chars: int) -> list[int]:
        piece = pieces(call_format)[index]
        work[:] = [0, 0]
        GRAMMARS[call_format].parse(piece * (num_chars // len(piece)), SPECS)
        assert work[0] <= 64 * num_chars
        return list(work)

    small, large = effort(10_000), effort(80_000)
    assert all(after <= 9 * before + 500 for before, after in zip(small, large, strict=True))
