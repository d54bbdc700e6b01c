"""Do the system prompts of a data set offer what the planner may call?

MATPO-data holds rendered prompts, in one variant for MATPO and one for single agents. Asking one
with the other's tools would run, and teach nothing; a tool whose arguments changed since the rows
were written teaches calls that are refused.

Invariants: no prompt raises, whatever stands in it; equal prompts are read once.

Source: MATPO original, `prompt_utils.py` (markers of the tool list; schemas there are the repr of a
Python dict) and `reward_manager/tool.py`, which reads them back. Differs: nothing is checked there;
its 4B single-agent script asks rows that offer a worker which the run does not have.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from megatron_matpo.agents.roster import Agent
from megatron_matpo.agents.tools import ToolSpec
from megatron_matpo.data.dataset import Question
from megatron_matpo.errors import ConfigError

_MARKS = re.compile(
    r"^## Server name: *(?P<server>\S+) *$|^### Tool name: *(?P<tool>\S+) *$"
    r"|^Input JSON schema:\s*(?P<schema>)",
    re.MULTILINE,
)
_NATIVE = re.compile(r"<tools>\n(.*?)\n</tools>", re.DOTALL)
_PARTS = re.compile(r"""[{}]|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""", re.DOTALL)
_ADVICE = (
    "take the data set's variant for this mode, rewrite its prompts (`matpo data prompts`), or set "
    "rollout.prompts=rendered"
)


@dataclass(frozen=True, slots=True)
class ListedTool:
    """A tool as a prompt lists it."""

    server: str
    """Empty in the list of a format that has no servers."""
    name: str
    schema: Mapping[str, Any] | None
    """None if it cannot be read. Free-form, because tool servers write it."""


def listed_tools(prompt: str) -> list[ListedTool]:
    """The tools that a system prompt lists, in either call format."""
    tools: list[ListedTool] = []
    server = name = ""
    for mark in _MARKS.finditer(prompt):
        if mark["server"]:
            server = mark["server"]
        elif mark["tool"]:
            name = mark["tool"]
            tools.append(ListedTool(server, name, None))
        elif tools and tools[-1].name == name:
            tools[-1] = ListedTool(server, name, _read_schema(prompt, mark.end()))
    for block in _NATIVE.finditer(prompt):
        tools += [tool for line in block[1].splitlines() for tool in _read_function(line)]
    return tools


def check_prompts(questions: Sequence[Question], planner: Agent, source: str) -> list[str]:
    """One line for every difference between the rows' prompts and what the planner may call.

    Each names the first row that shows it and counts the rows that do.

    Args:
        questions: rows of one data set.
        planner: with the live schemas of its tools.
        source: the data set, for messages.

    Raises:
        ConfigError: the planner's prompts are the rows' (`rollout.prompts: dataset`), and one of
            them offers a server or a tool that the planner may not call, or another call format.
    """
    num_rows = Counter(question.system for question in questions)
    first_row: dict[str, int] = {}
    for question in questions:
        first_row.setdefault(question.system, question.row)
    shown: dict[str, tuple[int, int]] = {}
    for prompt, count in num_rows.items():
        row = first_row[prompt]
        fatal = list(_foreign(prompt, planner))
        if fatal and planner.takes_prompt_of_row:
            raise ConfigError(
                f"{source}: the system prompt of row {row} {'; '.join(fatal)}; the planner "
                f"{planner.name} may call {_names(planner.tools) or 'nothing'}; {_ADVICE}"
            )
        for text in (*fatal, *_differences(listed_tools(prompt), planner.tools)):
            first, total = shown.get(text, (row, 0))
            shown[text] = (first, total + count)
    return [
        f"{source}: the system prompt of row {row} {text} ({total} of {len(questions)} rows)"
        for text, (row, total) in shown.items()
    ]


def _foreign(prompt: str, planner: Agent) -> Iterator[str]:
    """What no call of the row's prompt could ever do right."""
    own, other = planner.grammar.markers
    if other in prompt and own not in prompt:
        yield f"teaches calls as {other}, but rollout.call_format reads {own}"
    unknown = [tool for tool in listed_tools(prompt) if _live(tool, planner.tools) is None]
    if unknown:
        yield f"offers {_names(unknown)}"


def _differences(listed: Sequence[ListedTool], live: Sequence[ToolSpec]) -> Iterator[str]:
    found = [(tool, _live(tool, live)) for tool in listed]
    absent = [spec for spec in live if all(spec is not other for _, other in found)]
    if absent:
        yield f"does not offer {_names(absent)}"
    for tool, spec in found:
        if spec is not None:
            yield from (
                f"says of {spec.server}/{spec.name}: {text}" for text in _compare(tool, spec)
            )


def _live(tool: ListedTool, live: Sequence[ToolSpec]) -> ToolSpec | None:
    for spec in live:
        if spec.name == tool.name and tool.server in ("", spec.server):
            return spec
    return None


def _compare(tool: ListedTool, spec: ToolSpec) -> Iterator[str]:
    if tool.schema is None:
        yield "its schema cannot be read"
        return
    ours, theirs = _properties(tool.schema), _properties(spec.input_schema)
    pairs = [
        ("the arguments are", set(ours), set(theirs)),
        ("it requires", _required(tool.schema), _required(spec.input_schema)),
    ]
    for name in sorted(ours.keys() & theirs.keys()):
        types = _types(ours[name]), _types(theirs[name])
        if all(types):
            pairs.append((f"the type of {name} is", *types))
    for what, said, real in pairs:
        if said != real:
            yield f"{what} {_list(said)}, while its server says {_list(real)}"


def _properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    found = schema.get("properties")
    return {str(name): value for name, value in found.items()} if isinstance(found, dict) else {}


def _required(schema: Mapping[str, Any]) -> set[str]:
    found = schema.get("required")
    return {str(name) for name in found} if isinstance(found, list) else set()


def _types(schema: Any) -> set[str]:
    found = schema.get("type") if isinstance(schema, dict) else None
    return {str(name) for name in (found if isinstance(found, list) else [found]) if name}


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _names(tools: Sequence[ListedTool | ToolSpec]) -> str:
    return ", ".join(dict.fromkeys(f"{tool.server}/{tool.name}".lstrip("/") for tool in tools))


def _read_schema(text: str, start: int) -> Mapping[str, Any] | None:
    """The JSON object or Python dict at `start`; other text may follow it."""
    depth = 0
    if not text.startswith("{", start):
        return None
    for part in _PARTS.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(part[0], 0)
        if depth == 0:
            return _read_object(text[start : part.end()])
    return None


def _read_object(text: str) -> Mapping[str, Any] | None:
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict):
            return cast("dict[str, Any]", value)
    return None


def _read_function(line: str) -> Iterator[ListedTool]:
    """The tool of one line between `<tools>` and `</tools>`, if it is one."""
    entry = _read_object(line)
    function = entry.get("function") if entry else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        schema = function.get("parameters")
        yield ListedTool("", function["name"], schema if isinstance(schema, dict) else None)
