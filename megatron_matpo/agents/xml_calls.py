"""The MCP XML call format, which MATPO's checkpoints and data sets know.

    <use_mcp_tool>
    <server_name>SERVER</server_name>
    <tool_name>TOOL</tool_name>
    <arguments>
    { JSON object }
    </arguments>
    </use_mcp_tool>

Replies are plain user messages, one per call. Tool lists carry the schemas between fixed markers
(`## Server name:`, `### Tool name:`, `Input JSON schema:`), which data sets hold as well.

Source: MATPO original, `verl/workers/rollout/sglang_rollout/sglang_rollout.py` (parsing),
`examples/data_preprocess/prompt_utils.py` (tool list, introduction). Differs: there, server names
are not checked at execution, one broken call drops all calls of its turn, and schemas are listed as
the repr of a Python dict; no fixed date stands in the prompt.
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

TAGS = Tags("<use_mcp_tool>", "</use_mcp_tool>", "<tool_call>")
CALL_EXAMPLE = (
    f"{TAGS.open}\n<server_name>SERVER</server_name>\n<tool_name>TOOL</tool_name>\n"
    f'<arguments>\n{{"ARGUMENT": "VALUE"}}\n</arguments>\n{TAGS.close}'
)
_INTRO = (
    "In this environment you have access to a set of tools. Call one tool per message; the reply "
    "is the next user message. Work step by step, each step informed by the replies before it.\n\n"
    "# Tool-Use Formatting Instructions\n\n"
    "A call is written in XML tags, at the end of your message, at top level and not nested in "
    f"other tags:\n\n{CALL_EXAMPLE}\n\n"
    "The server name and the tool name must be as listed; the arguments are one JSON object that "
    "follows the tool's schema.\n\n"
)
_HEAD = re.compile(
    r"\s*<server_name>([^<]*)</server_name>\s*<tool_name>([^<]*)</tool_name>\s*<arguments>\s*"
)
_TAIL = re.compile(r"\s*</arguments>\s*</use_mcp_tool>")
_TAIL_ERROR = f"</arguments> and {TAGS.close} must follow the JSON object"
_SHAPE = "a call holds <server_name>, <tool_name> and <arguments>, in this order"
_SERVER = re.compile(r"<server_name>([^<]*)</server_name>")
_TOOL = re.compile(r"<tool_name>([^<]*)</tool_name>")
# Of a broken block, characters that are searched for names; of a name, characters that are shown.
_NAMES_WITHIN = 500
_MAX_NAME = 100


class XmlCalls:
    """`CallGrammar` of `rollout.call_format: mcp_xml`."""

    example = CALL_EXAMPLE
    names_servers = True
    markers = (TAGS.open, TAGS.foreign)

    def parse(
        self, text: str, tools: Iterable[ToolSpec], starts_in_thinking: bool = False
    ) -> list[ParsedCall]:
        """As `CallGrammar.parse`."""
        catalog = {(spec.server, spec.name): spec for spec in tools}
        return _Scanner(text, catalog).scan(starts_in_thinking)

    def without_calls(self, text: str) -> str:
        """As `CallGrammar.without_calls`."""
        return _Scanner(text, {}).without_blocks()

    def tool_list(self, tools: Iterable[ToolSpec]) -> str:
        """The tools between their markers, servers in order of appearance."""
        by_server: dict[str, list[ToolSpec]] = {}
        for tool in tools:
            by_server.setdefault(tool.server, []).append(tool)
        if not by_server:
            return "There are no tools."
        parts = ["Here are the functions available in JSONSchema format:\n"]
        for server, items in by_server.items():
            parts.append(f"\n## Server name: {server}\n")
            for tool in items:
                schema = json.dumps(tool.input_schema, ensure_ascii=False)
                parts.append(
                    f"### Tool name: {tool.name}\nDescription: {tool.description}\n"
                    f"Input JSON schema: {schema}\n"
                )
        return "".join(parts)

    def system_prompt(self, guidance: str, tools: Sequence[ToolSpec]) -> str:
        """How to call, the tools, then the guidance: the original's order."""
        return f"{_INTRO}{self.tool_list(tools)}\n{guidance}"

    def label(self, call: ParsedCall) -> str:
        """`SERVER/TOOL`."""
        return f"{call.server[:_MAX_NAME]}/{call.tool[:_MAX_NAME]}" if call.tool else ""

    def wrap(self, replies: Sequence[str]) -> list[str]:
        """The replies themselves, one user message each."""
        return list(replies)


class _Scanner(BlockScanner):
    def __init__(self, text: str, catalog: Mapping[tuple[str, str], ToolSpec]) -> None:
        super().__init__(text, TAGS)
        self._catalog = catalog

    def _read(self, body: int) -> tuple[ParsedCall, int] | Broken:
        head = _HEAD.match(self._text, body)
        if head is None:
            return Broken(CallOutcome.MALFORMED, _SHAPE, *self._names(body))
        found = self._json_value(head.end(), "the arguments are", _TAIL, _TAIL_ERROR)
        if isinstance(found, str):
            return Broken(CallOutcome.BAD_JSON, found, *self._names(body))
        value, end = found
        return self._check(head[1].strip(), head[2].strip(), value), end

    def _names(self, body: int) -> tuple[str, str]:
        """Names in a broken block, as far as they can be read; for records only."""
        end = self._text.find("<arguments>", body, body + _NAMES_WITHIN)
        part = self._text[body : end if end >= 0 else body + _NAMES_WITHIN].partition(TAGS.open)[0]
        server, tool = _SERVER.search(part), _TOOL.search(part)
        return (server[1].strip() if server else "", tool[1].strip() if tool else "")

    def _check(self, server: str, tool: str, value: Any) -> ParsedCall:
        """Classify a block that could be read."""
        if not isinstance(value, dict):
            detail = f"the arguments must be a JSON object, not {type_name(value)}"
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
        detail = (
            f"there is no tool {tool[:_MAX_NAME]!r} for you; your tools (server / tool): {known}"
        )
        return ParsedCall(CallOutcome.UNKNOWN_TOOL, server, tool, value, detail)
