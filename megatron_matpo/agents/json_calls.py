"""The JSON call format that is native to Qwen and Hermes models.

    <tool_call>
    {"name": "TOOL", "arguments": { ... }}
    </tool_call>

No server stands in a call, hence an agent's tools must have names of their own. The tool list and
the replies are written as Qwen's chat template writes them (`tools`, role `tool`): the list in
`<tools>`, one JSON function per line, and all replies of a turn as `<tool_response>` blocks of one
user message, so that a model with native tool use meets what it was trained on. Other tokenizers
get the same text.

Source: the chat template of Qwen2.5 and Qwen3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_matpo.agents.arguments import check_arguments, type_name
from megatron_matpo.agents.blocks import BlockScanner, Broken, Tags
from megatron_matpo.agents.grammar import CallOutcome, ParsedCall
from megatron_matpo.agents.tools import ToolSpec

TAGS = Tags("<tool_call>", "</tool_call>", "<use_mcp_tool>")
CALL_EXAMPLE = (
    f'{TAGS.open}\n{{"name": "TOOL", "arguments": {{"ARGUMENT": "VALUE"}}}}\n{TAGS.close}'
)
_LIST_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_LIST_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    f"within {TAGS.open}{TAGS.close} XML tags:\n{TAGS.open}\n"
    f'{{"name": <function-name>, "arguments": <args-json-object>}}\n{TAGS.close}'
)
_REPLY_TAG = re.compile(r"<(/?tool_response>)")
_SPACE = re.compile(r"\s*")
_TAIL = re.compile(r"\s*</tool_call>")
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]{1,100})"')
# Of a broken block, characters that are searched for a name; of a name, characters that are shown.
_NAME_WITHIN = 500
_MAX_NAME = 100
_BREAK = "\u200b"  # zero-width space


class JsonCalls:
    """`CallGrammar` of `rollout.call_format: tool_call`."""

    example = CALL_EXAMPLE
    names_servers = False
    markers = (TAGS.open, TAGS.foreign)

    def parse(
        self, text: str, tools: Iterable[ToolSpec], starts_in_thinking: bool = False
    ) -> list[ParsedCall]:
        """As `CallGrammar.parse`; the names of `tools` must differ."""
        return _Scanner(text, {spec.name: spec for spec in tools}).scan(starts_in_thinking)

    def without_calls(self, text: str) -> str:
        """As `CallGrammar.without_calls`."""
        return _Scanner(text, {}).without_blocks()

    def tool_list(self, tools: Iterable[ToolSpec]) -> str:
        """The list and the form of a call, as Qwen's template appends them to a system message."""
        lines = [json.dumps(_function(tool), ensure_ascii=False) for tool in tools]
        return _LIST_HEAD + "\n".join(lines) + _LIST_TAIL if lines else "There are no tools."

    def system_prompt(self, guidance: str, tools: Sequence[ToolSpec]) -> str:
        """The guidance, then the tools: the template's order."""
        return f"{guidance}\n\n{self.tool_list(tools)}"

    def label(self, call: ParsedCall) -> str:
        """The tool's name."""
        return call.tool[:_MAX_NAME]

    def wrap(self, replies: Sequence[str]) -> list[str]:
        """One user message with a block per reply; text in a reply cannot end its block."""
        blocks = [_REPLY_TAG.sub(rf"<{_BREAK}\1", reply) for reply in replies]
        return ["\n".join(f"<tool_response>\n{block}\n</tool_response>" for block in blocks)]


def _function(tool: ToolSpec) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.input_schema),
    }
    return {"type": "function", "function": function}


class _Scanner(BlockScanner):
    def __init__(self, text: str, catalog: Mapping[str, ToolSpec]) -> None:
        super().__init__(text, TAGS)
        self._catalog = catalog

    def _read(self, body: int) -> tuple[ParsedCall, int] | Broken:
        space = _SPACE.match(self._text, body)
        start = space.end() if space else body
        found = self._json_value(
            start, "the call is", _TAIL, f"{TAGS.close} must follow the JSON object"
        )
        if isinstance(found, str):
            name = _NAME.search(self._text, body, body + _NAME_WITHIN)
            return Broken(CallOutcome.BAD_JSON, found, tool=name[1] if name else "")
        value, end = found
        return self._check(value), end

    def _check(self, value: Any) -> ParsedCall:
        """Classify a block that could be read."""
        if not isinstance(value, dict):
            detail = f"a call must be a JSON object, not {type_name(value)}"
            return ParsedCall(CallOutcome.NOT_AN_OBJECT, detail=detail)
        tool, arguments = value.get("name"), value.get("arguments")
        if not isinstance(tool, str) or set(value) != {"name", "arguments"}:
            detail = 'a call is one JSON object with "name" and "arguments"'
            name = tool if isinstance(tool, str) else ""
            return ParsedCall(CallOutcome.MALFORMED, "", name, detail=detail)
        spec = self._catalog.get(tool)
        server = spec.server if spec else ""
        if not isinstance(arguments, dict):
            detail = f"the arguments must be a JSON object, not {type_name(arguments)}"
            return ParsedCall(CallOutcome.NOT_AN_OBJECT, server, tool, detail=detail)
        if spec is None:
            known = ", ".join(self._catalog) or "none"
            detail = f"there is no tool {tool[:_MAX_NAME]!r} for you; your tools: {known}"
            return ParsedCall(CallOutcome.UNKNOWN_TOOL, "", tool, arguments, detail)
        outcome, detail = check_arguments(arguments, spec.input_schema)
        return ParsedCall(outcome, server, tool, arguments, detail)
