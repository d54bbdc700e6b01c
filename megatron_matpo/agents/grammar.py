"""What a tool call in a model turn is, whatever the format that it is written in.

Two formats (`rollout.call_format`) stand behind one protocol: `xml_calls.py` (MCP XML, which names
the server) and `json_calls.py` (`<tool_call>` JSON, which does not).

Invariants:

* one classification feeds both execution and the format score: only `ok` calls are executed and
  only they count as well formed;
* `CallGrammar.parse` never raises, whatever the text, and takes time linear in its length;
* what stands inside `<think>` is a thought: calls there are neither executed nor scored;
* a block in the other format is a call that was made wrongly, never plain text.

Source: MATPO original, `verl/workers/reward_manager/tool.py` (format score). Differs: there,
execution and score are two parsers that disagree; unclosed blocks, native `<tool_call>` blocks and
calls inside `<think>` score as perfect.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

from megatron_matpo.agents.tools import ToolSpec


class CallOutcome(StrEnum):
    """What became of one call block; only OK is executed."""

    OK = "ok"
    UNCLOSED = "unclosed"
    NESTED = "nested"
    """Another block stands inside it."""
    MALFORMED = "malformed"
    """Its parts are missing, out of order, or mixed with other text."""
    FOREIGN_SYNTAX = "foreign_syntax"
    """A block of the call format that the run does not use."""
    BAD_JSON = "bad_json"
    NOT_AN_OBJECT = "not_an_object"
    UNKNOWN_TOOL = "unknown_tool"
    """No such tool among those that the agent may call."""
    WRONG_SERVER = "wrong_server"
    MISSING_ARGUMENT = "missing_argument"
    UNKNOWN_ARGUMENT = "unknown_argument"
    MISTYPED_ARGUMENT = "mistyped_argument"
    TOO_MANY = "too_many"
    """A well-formed call, one more than the agent may make in one message."""


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One call block, in the order of the text."""

    outcome: CallOutcome
    server: str = ""
    """As written; a format without servers gives the server of the tool that it names."""
    tool: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Free-form: the tool's schema describes it."""
    detail: str = ""
    """What is wrong, in words for the model; empty if nothing is."""


class CallGrammar(Protocol):
    """One call format: how calls are explained, read, removed and answered."""

    @property
    def example(self) -> str:
        """The form of a call, with placeholders, as prompts and corrections show it."""
        ...

    @property
    def names_servers(self) -> bool:
        """A call names its server; else an agent's tools must have names of their own."""
        ...

    @property
    def markers(self) -> tuple[str, str]:
        """(opening tag of this format, opening tag of the format that is foreign to it)."""
        ...

    def parse(
        self, text: str, tools: Iterable[ToolSpec], starts_in_thinking: bool = False
    ) -> list[ParsedCall]:
        """All calls of one model turn, in order.

        Args:
            text: the turn, decoded, without its closing token.
            tools: what the agent may call.
            starts_in_thinking: the generation prompt already opened a `<think>` block.
        """
        ...

    def without_calls(self, text: str) -> str:
        """`text` without its complete call blocks."""
        ...

    def tool_list(self, tools: Iterable[ToolSpec]) -> str:
        """What `{tools}` of a system prompt becomes."""
        ...

    def system_prompt(self, guidance: str, tools: Sequence[ToolSpec]) -> str:
        """A whole system prompt: the agent's guidance, its tools, and how a call is written."""
        ...

    def label(self, call: ParsedCall) -> str:
        """The called tool as a correction names it; empty if no name could be read."""
        ...

    def wrap(self, replies: Sequence[str]) -> list[str]:
        """The user messages that carry the replies to the calls of one turn."""
        ...


def format_score(outcomes: Iterable[str]) -> float:
    """Share of well-formed calls, in [0, 1]; 1 without calls."""
    values = list(outcomes)
    return sum(value == CallOutcome.OK for value in values) / len(values) if values else 1.0


def refuse_surplus(calls: list[ParsedCall], most: int) -> list[ParsedCall]:
    """`calls` with every well-formed call after the first `most` refused; a broken one stays so."""
    detail = f"at most {most} calls may stand in one message"
    surplus = [
        replace(call, outcome=CallOutcome.TOO_MANY, detail=detail)
        if call.outcome is CallOutcome.OK
        else call
        for call in calls[most:]
    ]
    return calls[:most] + surplus


def visible_text(text: str, starts_in_thinking: bool = False) -> str:
    """What the turn says after its last thought; empty if it never stopped thinking."""
    _, closing, said = text.rpartition("</think>")
    if not closing and starts_in_thinking:
        return ""
    return said.partition("<think>")[0].lstrip("\n")
