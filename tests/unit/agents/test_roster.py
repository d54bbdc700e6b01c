"""Proves what each agent reads about itself and its tools, whatever its name and whatever it does.

That a policy acts on these texts is not proven here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_matpo.agents import prompts
from megatron_matpo.agents.roster import Roster, make_roster
from megatron_matpo.agents.tools import ToolSpec
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.types import Status

SPECS = [
    ToolSpec("web", "google_search", "Search.", {"type": "object"}),
    ToolSpec("math", "add", "Add.", {"type": "object"}),
]
AGENTS = {
    "boss": AgentConfig(role="planner", tools=["browsing_agent", "Rechner"]),
    "browsing_agent": AgentConfig(role="worker", tools=["web"]),
    "Rechner": AgentConfig(role="worker", tools=["math"], tool_name="calculate"),
}
RENDERED = RolloutConfig(planner="boss", prompts="rendered")


def roster(mode: str = "rendered", **agents: AgentConfig) -> Roster:
    return make_roster(AGENTS | agents, replace(RENDERED, prompts=mode), SPECS)


def test_a_worker_of_any_name_has_a_prompt_and_only_a_browsing_one_is_told_to_browse() -> None:
    made = roster()
    browsing = made.workers["browsing_agent"].system_prompt("")
    other = made.workers["Rechner"].system_prompt("")
    assert "search and browse" in browsing and "URL" in browsing
    assert "browse" not in other and "URL" not in other
    assert "## Server name: math" in other and "web" not in other
    said = made.planner.system_prompt("")
    assert said.count("Description: A worker with ") == 2
    assert "with web tools" in said and "with the tools add carries out" in said


def test_a_workers_description_is_read_by_both_sides() -> None:
    made = roster(Rechner=replace(AGENTS["Rechner"], description="Adds {tools} numbers."))
    assert "Description: Adds {tools} numbers." in made.planner.system_prompt("")
    assert "Adds {tools} numbers." in made.workers["Rechner"].system_prompt("")


@pytest.mark.parametrize("template", ["", "Be {objective} {tools}"])
def test_the_recipe_may_give_the_objective(template: str) -> None:
    worker = replace(AGENTS["Rechner"], objective="Only {tools} sums.", system_prompt=template)
    text = roster(Rechner=worker).workers["Rechner"].system_prompt("")
    assert "Only {tools} sums." in text and "carry out" not in text
    assert "### Tool name: add" in text


def test_rows_prompts_are_used_where_the_recipe_says_so() -> None:
    assert roster("dataset").planner.system_prompt("You plan.") == "You plan."
    assert "You plan." not in roster("rendered").planner.system_prompt("You plan.")
    worker = roster("dataset").workers["Rechner"]
    assert worker.system_prompt("") == roster("rendered").workers["Rechner"].system_prompt("")


@pytest.mark.parametrize("call_format", ["mcp_xml", "tool_call"])
def test_a_built_in_prompt_explains_its_own_format_only(call_format: str) -> None:
    made = make_roster(AGENTS, replace(RENDERED, call_format=call_format), SPECS)
    for agent in (made.planner, *made.workers.values()):
        text = agent.system_prompt("")
        own, other = agent.grammar.markers
        assert own in text and other not in text
        assert "# General Objective" in text and "# Agent Specific Objective" in text
        for tool in agent.tools:
            assert tool.name in text


SPENT = {
    Status.OVERFLOW: "ran out of context",
    Status.MAX_TURNS: "ran out of turns",
    Status.TIME_LIMIT: "ran out of time",
    Status.INVALID_CALL: "calls could not be executed",
}


@pytest.mark.parametrize("status", [Status.ANSWERED, *SPENT])
def test_summary_requests_have_the_sections_of_the_released_checkpoints(status: Status) -> None:
    task, subtask = 'Who is "Bob" {subtask}?', 'find "it"'
    worker = prompts.worker_summary(task, subtask, status)
    planner = prompts.planner_summary(task, status)
    for text in (worker, planner):
        assert text.startswith("[SYSTEM]\n") and "MUST NOT use any tool" in text
        assert "`# Final Response: [" in text
        assert (SPENT.get(status, "") in text) and ("ran out" in text) == (
            status in SPENT and status is not Status.INVALID_CALL
        )
    headings = ["## Conclusion", "## Supporting Information", "## Observations"]
    found = [worker.index(f"`{name}`") for name in [*headings, "## Contribution to Main Task"]]
    assert found == sorted(found)
    found = [planner.index(f"`{name}`") for name in headings]
    assert found == sorted(found) and "Contribution" not in planner
    assert f'The main task was: "{task}"\nYour assigned subtask was: "{subtask}"' in worker
    assert "([link])" in worker
    assert f'The original task was: "{task}"' in planner and "\\boxed{}" in planner
    assert ("do not attempt to answer the original task" in worker) == (status in SPENT)
    assert ("none can be determined" in planner) == (status in SPENT)
