r"""Every text that the environment itself writes: system prompts, recaps, summaries, corrections.

Invariants:

* task and subtask are fields that are put into templates; they are never read back from text;
* how tools are listed and called is the call format's business (`CallGrammar`), not the agents'.

Source: MATPO original, `examples/data_preprocess/prompt_utils.py` (prompts, final summary) and
`verl/workers/rollout/sglang_rollout/sglang_rollout.py` (recap). Structure and markers are kept, so
that policies trained there understand them; the wording is ours. Differs: an agent of any name has
a prompt, with an objective made of its description; no fixed date; the planner's final summary asks
for the answer in `\boxed{}` itself; a summary request says what ran out, and an agent that answers
in its last turn has not failed.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from megatron_matpo.agents.grammar import CallGrammar, ParsedCall
from megatron_matpo.types import Status

# Names of the tools that make a worker one that browses (the tools of the MATPO data sets).
_BROWSING_TOOLS = frozenset({"google_search", "scrape"})
_BROWSING_DESCRIPTION = (
    "A worker with web tools carries out one subtask in a context of its own and reports what it "
    "found. It knows the main task, but nothing of what you have read so far: say in the subtask "
    "all that it needs."
)
_NEUTRAL_DESCRIPTION = (
    "A worker with the tools {names} carries out one subtask in a context of its own and reports "
    "what it found. It knows the main task, but nothing of what you have read so far: say in the "
    "subtask all that it needs."
)

_GUIDANCE = (
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
_OBJECTIVE_HEAD = "# Agent Specific Objective\n\n"
PLANNER_OBJECTIVE = (
    "You solve the task as a whole: complete, accurate and well reasoned. Your last message is the "
    "answer."
)
_BROWSING_OBJECTIVE = (
    "You search and browse for specific facts on behalf of a planner. Report what the sources say "
    "and do not infer more; judge how reliable a source is; name conflicts and uncertainty; quote "
    "the passages that matter with their URL. If context is missing, say what you would need."
)
_NEUTRAL_OBJECTIVE = (
    "You carry out one subtask on behalf of a planner, with your tools. Report what they gave and "
    "do not infer more; say how you came to a result and how sure it is; name conflicts and "
    "failures. If context is missing, say what you would need."
)

WORKER_USER_TEMPLATE = (
    "[CONTEXT]\nYou are a sub-agent that works on a part of a larger task.\n"
    'The main task is: "{task}"\n\n'
    '[YOUR ASSIGNED SUBTASK]\nYour current subtask is: "{subtask}"\n\n'
    "[INSTRUCTIONS]\nFocus on the subtask and keep the main task in mind. Give a detailed answer "
    "with supporting information; it goes back to the planner."
)

_SUMMARY_HEAD = (
    "[SYSTEM]\nThis is a direct instruction and your final turn: you MUST NOT use any tool. "
    "Write a structured report in markdown: facts only, no filler. It starts with "
    "`# Final Response: [Title of the task]`.\n\n"
)
_WORKER_SUMMARY = (
    _SUMMARY_HEAD
    + '[CONTEXT]\nThe main task was: "{task}"\nYour assigned subtask was: "{subtask}"\n\n'
    "Use the headings `## Conclusion`, `## Supporting Information`, `## Observations` and "
    "`## Contribution to Main Task`, in this order. Write ([link]) in place of a raw URL."
)
_WORKER_FAILED = (
    ": do not attempt to answer the original task, acknowledge that the subtask is not finished, "
    "and explain in Observations how far you came."
)
_PLANNER_SUMMARY = (
    _SUMMARY_HEAD + '[CONTEXT]\nThe original task was: "{task}"\n\n'
    "Use the headings `## Conclusion`, `## Supporting Information` and `## Observations`, in this "
    "order, without raw URLs. Wrap the final answer in \\boxed{}."
)
_PLANNER_FAILED = (
    ": give the final answer that best fits what was gathered, or state that none can be "
    "determined."
)
_WHAT_RAN_OUT = {
    Status.OVERFLOW: " You ran out of context",
    Status.MAX_TURNS: " You ran out of turns",
    Status.TIME_LIMIT: " You ran out of time",
    Status.INVALID_CALL: " Too many of your calls could not be executed",
}
_FIELD = re.compile(r"\{(task|subtask|tools|objective)\}")


def fill(template: str, **values: str) -> str:
    """Put values into `{task}`, `{subtask}`, `{tools}`, `{objective}`.

    Braces inside values stay as they are, and so does a field without a value.
    """
    return _FIELD.sub(lambda match: values.get(match[1], match[0]), template)


def guidance(objective: str) -> str:
    """What a built-in system prompt says apart from the tools."""
    return f"{_GUIDANCE}{_OBJECTIVE_HEAD}{objective}"


def worker_objective(description: str, tool_names: Collection[str]) -> str:
    """What a worker is for: the browsing worker of MATPO, or one of any other kind.

    Args:
        description: what its planner reads about it; empty if the recipe has none.
        tool_names: what it may call.
    """
    if _BROWSING_TOOLS & set(tool_names):
        return _BROWSING_OBJECTIVE
    return (
        f"{_NEUTRAL_OBJECTIVE} Your planner knows you as: {description}"
        if description
        else (_NEUTRAL_OBJECTIVE)
    )


def default_description(tool_names: Collection[str]) -> str:
    """What a planner reads about a worker whose recipe has no description."""
    if _BROWSING_TOOLS & set(tool_names):
        return _BROWSING_DESCRIPTION
    return _NEUTRAL_DESCRIPTION.replace("{names}", ", ".join(tool_names) or "(none)")


def planner_summary(task: str, status: Status) -> str:
    """Final summary request of a planner whose turns ended with `status`."""
    text = fill(_PLANNER_SUMMARY, task=task)
    return f"{text}{_WHAT_RAN_OUT[status]}{_PLANNER_FAILED}" if status in _WHAT_RAN_OUT else text


def worker_summary(task: str, subtask: str, status: Status) -> str:
    """Final summary request of a worker whose turns ended with `status`."""
    text = fill(_WORKER_SUMMARY, task=task, subtask=subtask)
    return f"{text}{_WHAT_RAN_OUT[status]}{_WORKER_FAILED}" if status in _WHAT_RAN_OUT else text


def correction(call: ParsedCall, grammar: CallGrammar) -> str:
    """Reply to a call that could not be executed: what is wrong, and what a call looks like."""
    name = grammar.label(call) or "The tool call"
    return f"{name} was not executed: {call.detail}.\nA call has this form:\n{grammar.example}"


def missing_report(status: str) -> str:
    """Stands for the report of a worker that said nothing."""
    return f"The worker ended without a report ({status})."
