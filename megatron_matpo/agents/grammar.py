"""Tool calls in a model turn: found, classified, and checked against what the agent may call.

    <use_mcp_tool>
    <server_name>SERVER</server_name>
    <tool_name>TOOL</tool_name>
    <arguments>
    { JSON object }
    </arguments>
    </use_mcp_tool>

Invariants:

* one classification feeds both execution and the format score: only `ok` calls are executed and
  only they count as well formed;
* `parse_calls` never raises, whatever the text, and takes time linear in its length;
* what stands inside `<think>` is a thought: calls there are neither executed nor scored.

Source: MATPO original, `verl/workers/rollout/sglang_rollout/sglang_rollout.py` (parsing) and
`verl/workers/reward_manager/tool.py` (format score). Differs: there, execution and score are two
parsers that disagree; server names are not checked at execution; unclosed blocks, native
`<tool_call>` blocks and calls inside `<think>` score as perfect.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NoReturn

from megatron_matpo.agents.tools import ToolSpec

OPEN, CLOSE = "<use_mcp_tool>", "</use_mcp_tool>"
CALL_EXAMPLE = (
    f"{OPEN}\n<server_name>SERVER</server_name>\n<tool_name>TOOL</tool_name>\n"
    f'<arguments>\n{{"ARGUMENT": "VALUE"}}\n</arguments>\n{CLOSE}'
)


class CallOutcome(StrEnum):
    """What became of one call block; only OK is executed."""

    OK = "ok"
    UNCLOSED = "unclosed"
    NESTED = "nested"
    """Another block stands inside it."""
    MALFORMED = "malformed"
    """Its parts are missing, out of order, or mixed with other text."""
    FOREIGN_SYNTAX = "foreign_syntax"
    """A `<tool_call>` block, which other systems use."""
    BAD_JSON = "bad_json"
    NOT_AN_OBJECT = "not_an_object"
    UNKNOWN_TOOL = "unknown_tool"
    """No such tool among those that the agent may call."""
    WRONG_SERVER = "wrong_server"
    MISSING_ARGUMENT = "missing_argument"
    UNKNOWN_ARGUMENT = "unknown_argument"
    MISTYPED_ARGUMENT = "mistyped_argument"
    TOO_MANY = "too_many"
    """More calls in one message than the agent may make."""


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One call block, in the order of the text."""

    outcome: CallOutcome
    server: str = ""
    tool: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Free-form: the tool's schema describes it."""
    detail: str = ""
    """What is wrong, in words for the model; empty if nothing is."""


def format_score(outcomes: Iterable[str]) -> float:
    """Share of well-formed calls, in [0, 1]; 1 without calls."""
    values = list(outcomes)
    return sum(value == CallOutcome.OK for value in values) / len(values) if values else 1.0


def refuse_surplus(calls: list[ParsedCall], most: int) -> list[ParsedCall]:
    """`calls` with every call after the first `most` refused."""
    detail = f"at most {most} calls may stand in one message"
    surplus = [replace(call, outcome=CallOutcome.TOO_MANY, detail=detail) for call in calls[most:]]
    return calls[:most] + surplus


# Call tags inside one JSON string that the parser looks past.
_MAX_TAGS_TRIED = 8
_TAGS = re.compile(r"</?use_mcp_tool>|</?think>|<tool_call>")
_HEAD = re.compile(
    r"\s*<server_name>([^<]*)</server_name>\s*<tool_name>([^<]*)</tool_name>\s*<arguments>\s*"
)
_TAIL = re.compile(r"\s*</arguments>\s*</use_mcp_tool>")
_SERVER = re.compile(r"<server_name>([^<]*)</server_name>")
_TOOL = re.compile(r"<tool_name>([^<]*)</tool_name>")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_can_be_sent(value: Any) -> None:
    """Raise ValueError for JSON that a tool server cannot be sent: it would look like its fault."""
    # A lone surrogate has no UTF-8 form; 1e999 reads as infinity.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()
    depth = deepest = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > _MAX_DEPTH:
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")


_BRACKETS = re.compile(r"[\[\]{}]")
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"')
# The MCP SDK refuses to serialise a little more than twice this depth.
_MAX_DEPTH = 100
_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_calls(
    text: str, tools: Iterable[ToolSpec], starts_in_thinking: bool = False
) -> list[ParsedCall]:
    """All calls of one model turn, in order.

    Args:
        text: the turn, decoded, without its closing token.
        tools: what the agent may call.
        starts_in_thinking: the generation prompt already opened a `<think>` block.
    """
    catalog = {(spec.server, spec.name): spec for spec in tools}
    return _Scanner(text, catalog).scan(starts_in_thinking)


def visible_text(text: str, starts_in_thinking: bool = False) -> str:
    """What the turn says after its last thought; empty if it never stopped thinking."""
    _, closing, said = text.rpartition("</think>")
    if not closing and starts_in_thinking:
        return ""
    return said.partition("<think>")[0].lstrip("\n")


def strip_calls(text: str) -> str:
    """`text` without its complete call blocks."""
    kept: list[str] = []
    position = 0
    while True:
        start = text.find(OPEN, position)
        end = text.find(CLOSE, start) if start >= 0 else -1
        if end < 0:
            kept.append(text[position:])
            return "".join(kept).strip()
        kept.append(text[position:start])
        position = end + len(CLOSE)


class _Scanner:
    """One pass over the tags of a turn."""

    def __init__(self, text: str, catalog: Mapping[tuple[str, str], ToolSpec]) -> None:
        self._text = text
        self._catalog = catalog
        self._tags = [(match.start(), match[0]) for match in _TAGS.finditer(text)]
        self._marks = [(start, tag) for start, tag in self._tags if tag in (OPEN, CLOSE)]
        self._ends = self._match_blocks()

    def scan(self, starts_in_thinking: bool) -> list[ParsedCall]:
        calls: list[ParsedCall] = []
        position, thinking = 0, starts_in_thinking
        for start, tag in self._tags:
            if start < position:
                continue  # inside a block that was dealt with
            if tag == "</think>":
                if not thinking:
                    calls.clear()  # its opening tag is missing: all before it was a thought
                thinking = False
            elif thinking:
                continue
            elif tag == "<think>":
                thinking = True
            elif tag == OPEN:
                call, position = self._block(start)
                calls.append(call)
            elif tag == CLOSE:
                calls.append(ParsedCall(CallOutcome.MALFORMED, detail=f"{CLOSE} closes nothing"))
            else:
                calls.append(
                    ParsedCall(
                        CallOutcome.FOREIGN_SYNTAX, detail="<tool_call> is not the call format"
                    )
                )
        return calls

    def _match_blocks(self) -> dict[int, tuple[int, bool]]:
        """Start of each closed block -> (its end, whether it holds another closed block)."""
        ends: dict[int, tuple[int, bool]] = {}
        stack: list[tuple[int, bool]] = []
        for start, tag in self._tags:
            if tag == OPEN:
                stack.append((start, False))
            elif tag == CLOSE and stack:
                opened, holds_block = stack.pop()
                ends[opened] = (start + len(CLOSE), holds_block)
                if stack:
                    stack[-1] = (stack[-1][0], True)
        return ends

    def _block(self, start: int) -> tuple[ParsedCall, int]:
        """The call that opens at `start`, and where to go on."""
        body = start + len(OPEN)
        arguments: tuple[Any, int] | str | None = None
        head = _HEAD.match(self._text, body)
        if head is not None:
            arguments = self._arguments(head.end())
            if not isinstance(arguments, str):
                value, end = arguments
                return self._check(head[1].strip(), head[2].strip(), value), end
        server, tool = self._names(body)
        if start not in self._ends:
            # The rest of the text is looked at again: a good block may follow.
            detail = f"the call is not closed by {CLOSE}"
            return ParsedCall(CallOutcome.UNCLOSED, server, tool, detail=detail), body
        end, holds_block = self._ends[start]
        if holds_block:
            detail = "a call must not stand inside another call"
            return ParsedCall(CallOutcome.NESTED, server, tool, detail=detail), end
        if isinstance(arguments, str):
            return ParsedCall(CallOutcome.BAD_JSON, server, tool, detail=arguments), end
        detail = "a call holds <server_name>, <tool_name> and <arguments>, in this order"
        return ParsedCall(CallOutcome.MALFORMED, server, tool, detail=detail), end

    def _arguments(self, start: int) -> tuple[Any, int] | str:
        """(value, end of the block), or why the arguments cannot be read.

        Only the text up to a closing tag is handed to the JSON decoder: its errors count the lines
        of all they were given, which would make many broken blocks quadratic. A closing tag may
        stand inside a string, hence a few of them are tried.
        """
        reason = f"the call is not closed by {CLOSE}"
        first = bisect_left(self._marks, (start, ""))
        for position, tag in self._marks[first : first + _MAX_TAGS_TRIED]:
            if tag != CLOSE:
                continue
            part = self._text[start : position + len(CLOSE)]
            try:
                value, end = _JSON.raw_decode(part)
                _check_can_be_sent(value)
            except (ValueError, RecursionError) as error:
                reason = f"the arguments are not valid JSON: {getattr(error, 'msg', error)}"
                if "Unterminated string" in reason:
                    continue
                return reason
            tail = _TAIL.match(part, end)
            if tail is None:
                return f"</arguments> and {CLOSE} must follow the JSON object"
            return value, start + tail.end()
        return reason

    def _names(self, body: int) -> tuple[str, str]:
        """Names in a broken block, as far as they can be read; for records only."""
        end = self._text.find("<arguments>", body, body + 500)
        part = self._text[body : end if end >= 0 else body + 500].partition(OPEN)[0]
        server, tool = _SERVER.search(part), _TOOL.search(part)
        return (server[1].strip() if server else "", tool[1].strip() if tool else "")

    def _check(self, server: str, tool: str, value: Any) -> ParsedCall:
        """Classify a block that could be read."""
        if not isinstance(value, dict):
            detail = f"the arguments must be a JSON object, not {_type_name(value)}"
            return ParsedCall(CallOutcome.NOT_AN_OBJECT, server, tool, detail=detail)
        spec = self._catalog.get((server, tool))
        if spec is None:
            return self._unknown(server, tool, value)
        outcome, detail = check_arguments(value, spec.input_schema)
        return ParsedCall(outcome, server, tool, value, detail)

    def _unknown(self, server: str, tool: str, value: dict[str, Any]) -> ParsedCall:
        servers = sorted(spec.server for spec in self._catalog.values() if spec.name == tool)
        if servers:
            detail = f"the tool {tool!r} belongs to the server {' or '.join(servers)}"
            return ParsedCall(CallOutcome.WRONG_SERVER, server, tool, value, detail)
        known = ", ".join(f"{s} / {t}" for s, t in self._catalog) or "none"
        detail = f"there is no tool {tool[:100]!r} for you; your tools (server / tool): {known}"
        return ParsedCall(CallOutcome.UNKNOWN_TOOL, server, tool, value, detail)


def check_arguments(
    arguments: Mapping[str, Any], schema: Mapping[str, Any]
) -> tuple[CallOutcome, str]:
    """Outcome and detail of arguments under a JSON schema: names, and types of the top level."""
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    required = schema.get("required")
    names = required if isinstance(required, list) else []
    missing = [str(name) for name in names if name not in arguments]
    if missing:
        return CallOutcome.MISSING_ARGUMENT, f"required arguments are missing: {', '.join(missing)}"
    unknown = [name for name in arguments if name not in properties]
    if unknown and not schema.get("additionalProperties"):
        known = ", ".join(properties) or "none"
        shown = ", ".join(unknown)[:200]
        return CallOutcome.UNKNOWN_ARGUMENT, f"unknown arguments: {shown}; known: {known}"
    for name, value in arguments.items():
        expected = properties.get(name)
        if isinstance(expected, Mapping) and not _has_type(value, expected):
            wanted = expected.get("type", "another type")
            return (
                CallOutcome.MISTYPED_ARGUMENT,
                f"the argument {name!r} must be {wanted}, not {_type_name(value)}",
            )
    return CallOutcome.OK, ""


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def _has_type(value: Any, schema: Mapping[str, Any]) -> bool:
    for key in ("anyOf", "oneOf"):
        options = schema.get(key)
        if isinstance(options, list) and options:
            return any(isinstance(item, Mapping) and _has_type(value, item) for item in options)
    declared = schema.get("type")
    names = declared if isinstance(declared, list) else [declared]
    return any(_is_a(value, name) for name in names)


def _is_a(value: Any, name: Any) -> bool:
    if not isinstance(name, str) or name not in _TYPES:
        return True  # not declared, or a type that JSON schema does not have: nothing to hold to
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name])


def _type_name(value: Any) -> str:
    for name, types in _TYPES.items():
        if isinstance(value, types) and not (isinstance(value, bool) and name != "boolean"):
            return name
    return type(value).__name__
