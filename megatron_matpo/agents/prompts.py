r"""Every text that the environment itself writes: system prompts, recaps, summaries, corrections.

Invariants:

* task and subtask are fields that are put into templates; they are never read back from text;
* tool lists carry real JSON schemas between fixed markers, which data sets hold as well.

Source: MATPO original, `examples/data_preprocess/prompt_utils.py` (prompts, final summary) and
`verl/workers/rollout/sglang_rollout/sglang_rollout.py` (recap). Structure and markers are kept, so
that policies trained there understand them; the wording is ours. Differs: schemas are JSON and not
the repr of a Python dict; no fixed date; the planner's final summary asks for the answer in
`\boxed{}` itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from megatron_matpo.agents.grammar import CALL_EXAMPLE, ParsedCall
from megatron_matpo.agents.tools import ToolSpec

DEFAULT_AGENT_DESCRIPTION = (
    "A worker with web tools carries out one subtask in a context of its own and reports what it "
    "found. It knows the main task, but nothing of what you have read so far: say in the subtask "
    "all that it needs."
)

_INTRO = (
    "In this environment you have access to a set of tools. Call one tool per message; the reply "
    "is the next user message. Work step by step, each step informed by the replies before it.\n\n"
    "# Tool-Use Formatting Instructions\n\n"
    "A call is written in XML tags, at the end of your message, at top level and not nested in "
    f"other tags:\n\n{CALL_EXAMPLE}\n\n"
    "The server name and the tool name must be as listed; the arguments are one JSON object that "
    "follows the tool's schema.\n\n{tools}\n"
)
_OBJECTIVE = (
    "# General Objective\n\nYou accomplish a task by breaking it down into clear steps.\n\n"
    "## Task Strategy\n\n"
    "1. Read the task and set goals that can be reached one after another.\n"
    "2. Work through them in order, with the tools where they help.\n"
    "3. When a reply is not what you expected, change the plan.\n\n"
    "## Tool-Use Guidelines\n\n"
    "1. Use a tool only when it brings you closer to the answer.\n"
    "2. Give all required arguments; make up no values.\n"
    "3. Never repeat a call that failed without changing it.\n\n"
    "## Tool-Use Communication Rules\n\n"
    "1. Do not write a tool's reply yourself: end the message after the call.\n"
    "2. A message without a call is your final answer.\n\n"
)
_PLANNER_OBJECTIVE = (
    "# Agent Specific Objective\n\nYou solve the task as a whole: complete, accurate and well "
    "reasoned. Your last message is the answer."
)
_WORKER_OBJECTIVE = (
    "# Agent Specific Objective\n\nYou search and browse for specific facts on behalf of a "
    "planner. Report what the sources say and do not infer more; judge how reliable a source is; "
    "name conflicts and uncertainty; quote the passages that matter with their URL. If context is "
    "missing, say what you would need."
)
PLANNER_SYSTEM_PROMPT = _INTRO + _OBJECTIVE + _PLANNER_OBJECTIVE
WORKER_SYSTEM_PROMPT = _INTRO + _OBJECTIVE + _WORKER_OBJECTIVE

WORKER_USER_TEMPLATE = (
    "[CONTEXT]\nYou are a sub-agent that works on a part of a larger task.\n"
    'The main task is: "{task}"\n\n'
    '[YOUR ASSIGNED SUBTASK]\nYour current subtask is: "{subtask}"\n\n'
    "[INSTRUCTIONS]\nFocus on the subtask and keep the main task in mind. Give a detailed answer "
    "with supporting information; it goes back to the planner."
)

_SUMMARY_HEAD = (
    "[SYSTEM]\nThis is a direct instruction and your final turn: you MUST NOT use any tool. "
    "Write a structured report in markdown, facts only, that starts with "
    "`# Final Response: [Title of the task]`.\n\n"
)
_WORKER_SUMMARY = (
    _SUMMARY_HEAD
    + '[CONTEXT]\nThe main task was: "{task}"\nYour assigned subtask was: "{subtask}"\n\n'
    "Use the headings `## Conclusion`, `## Supporting Information`, `## Observations` and "
    "`## Contribution to Main Task`. Write ([link]) in place of a raw URL."
)
_WORKER_FAILED = (
    " You ran out of turns or of context: do not attempt to answer the main task, say that the "
    "subtask is not finished, and explain in Observations how far you came."
)
_PLANNER_SUMMARY = (
    _SUMMARY_HEAD + '[CONTEXT]\nThe original task was: "{task}"\n\n'
    "Use the headings `## Conclusion`, `## Supporting Information` and `## Observations`, without "
    "raw URLs. Wrap the final answer in \\boxed{}."
)
_PLANNER_FAILED = (
    " You ran out of turns or of context: give the answer that best fits what was gathered, or say "
    "that none can be determined."
)
_FIELD = re.compile(r"\{(task|subtask|tools)\}")


def fill(template: str, **values: str) -> str:
    """Put values into `{task}`, `{subtask}`, `{tools}`; braces inside values stay as they are."""
    return _FIELD.sub(lambda match: values.get(match[1], match[0]), template)


def tool_list(tools: Iterable[ToolSpec]) -> str:
    """The list of tools as prompts show it, servers in order of appearance."""
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


def planner_summary(task: str, is_failed: bool) -> str:
    """Final summary request of a planner."""
    text = fill(_PLANNER_SUMMARY, task=task)
    return text + _PLANNER_FAILED if is_failed else text


def worker_summary(task: str, subtask: str, is_failed: bool) -> str:
    """Final summary request of a worker."""
    text = fill(_WORKER_SUMMARY, task=task, subtask=subtask)
    return text + _WORKER_FAILED if is_failed else text


def correction(call: ParsedCall) -> str:
    """Reply to a call that could not be executed: what is wrong, and what a call looks like."""
    name = f"{call.server}/{call.tool}" if call.tool else "The tool call"
    return f"{name} was not executed: {call.detail}.\nA call has this form:\n{CALL_EXAMPLE}"


def missing_report(status: str) -> str:
    """Stands for the report of a worker that said nothing."""
    return f"The worker ended without a report ({status})."
