"""Proves how a data set's prompts are compared with what the planner may call.

The prompts follow the outline of MATPO-data's, of which no row is in the repository.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_matpo.agents.prompt_check import check_prompts, listed_tools
from megatron_matpo.agents.roster import Agent, make_roster
from megatron_matpo.agents.tools import ToolSpec
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.data.dataset import Question
from megatron_matpo.errors import ConfigError

SEARCH = {
    "type": "object",
    "properties": {
        "q": {"type": "string", "description": 'It\'s a "query" {with} braces'},
        "num": {"type": "number"},
    },
    "required": ["q"],
    "additionalProperties": False,
}
SPECS = [
    ToolSpec("web", "search", "Search.", SEARCH),
    ToolSpec("web", "scrape", "Read.", {"type": "object", "properties": {"url": {}}}),
]
AGENTS = {
    "planner": AgentConfig(role="planner", tools=["web"]),
    "boss": AgentConfig(role="planner", tools=["browser"]),
    "browser": AgentConfig(role="worker", tools=["web"]),
}
AFTER = "\n\n# General Objective\n\nIt's up to you: {\"not\": 'a schema'}.\n"


def agent(mode: str = "dataset", call_format: str = "mcp_xml", planner: str = "planner") -> Agent:
    rollout = RolloutConfig(planner=planner, prompts=mode, call_format=call_format)
    return make_roster(AGENTS, rollout, SPECS).planner


def listing(server: str, *tools: tuple[str, str]) -> str:
    head = "Here are the functions available in JSONSchema format:\n\n"
    body = "".join(
        f"### Tool name: {name}\nDescription: Does it.\nInput JSON schema: {schema}\n"
        for name, schema in tools
    )
    return f"You have tools.\n{head}## Server name: {server}\n{body}"


def rows(*prompts: str) -> list[Question]:
    return [
        Question(prompt, "Who?", "Who?", "Ada", "test", index)
        for index, prompt in enumerate(prompts)
    ]


GOOD = listing("web", ("search", repr(SEARCH)), ("scrape", repr(SPECS[1].input_schema))) + AFTER


@pytest.mark.parametrize("call_format", ["mcp_xml", "tool_call"])
@pytest.mark.parametrize("planner", ["planner", "boss"])
def test_our_own_rendering_is_read_back(call_format: str, planner: str) -> None:
    chosen = agent("dataset", call_format, planner)
    rendered = chosen.grammar.system_prompt("Be good.", chosen.tools)
    listed = listed_tools(rendered)
    servers = [""] * len(listed) if call_format == "tool_call" else [t.server for t in chosen.tools]
    assert [(tool.server, tool.name, tool.schema) for tool in listed] == [
        (server, tool.name, tool.input_schema)
        for server, tool in zip(servers, chosen.tools, strict=True)
    ]
    assert check_prompts(rows(rendered), chosen, "train") == []


def test_schemas_may_be_python_or_json_and_are_followed_by_text() -> None:
    (search, _) = listed_tools(GOOD)
    assert search.schema == SEARCH
    assert check_prompts(rows(GOOD), agent(), "train") == []


@pytest.mark.parametrize(
    ("prompt", "offered"),
    [
        (
            listing("browsing_agent", ("search_and_browse", "{}")),
            "browsing_agent/search_and_browse",
        ),
        (listing("web", ("search", repr(SEARCH)), ("translate", "{}")), "offers web/translate"),
        (f"{GOOD}<tool_call>", "teaches calls as <tool_call>, but rollout.call_format reads <use_"),
    ],
)
def test_foreign_offers_stop_a_run_that_uses_the_rows_prompts(prompt: str, offered: str) -> None:
    questions = rows(GOOD, GOOD, prompt)
    with pytest.raises(ConfigError) as caught:
        check_prompts(questions, agent(), "train")
    assert "train: the system prompt of row 2" in str(caught.value)
    assert offered in str(caught.value)
    assert "may call web/search, web/scrape" in str(caught.value)
    assert "rollout.prompts=rendered" in str(caught.value)
    lines = check_prompts(questions, agent("rendered"), "train")
    assert offered in lines[0] and "(1 of 3 rows)" in lines[0]


CHANGES = {
    "says of web/search: the arguments are gl, num, q, while its server says num, q": replace(
        SPECS[0],
        input_schema=SEARCH | {"properties": {**SEARCH["properties"], "gl": {"type": "string"}}},  # type: ignore[dict-item]
    ),
    "says of web/search: it requires num, q, while its server says q": replace(
        SPECS[0], input_schema=SEARCH | {"required": ["num", "q"]}
    ),
    "says of web/search: the type of num is string, while its server says number": replace(
        SPECS[0],
        input_schema=SEARCH | {"properties": {**SEARCH["properties"], "num": {"type": "string"}}},  # type: ignore[dict-item]
    ),
}


@pytest.mark.parametrize("expected", CHANGES)
def test_differences_are_counted_with_their_first_row(expected: str) -> None:
    old = listing(
        "web",
        ("search", repr(CHANGES[expected].input_schema)),
        ("scrape", repr(SPECS[1].input_schema)),
    )
    lines = check_prompts(rows(GOOD, old, old + "Again.", old), agent(), "eval set")
    assert lines == [f"eval set: the system prompt of row 1 {expected} (3 of 4 rows)"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("You plan.", "does not offer web/search, web/scrape"),
        (listing("web", ("search", repr(SEARCH))), "does not offer web/scrape"),
        (GOOD.replace("schema: {", "schema: of {", 1), "cannot be read"),
        (GOOD.replace("schema: {", "schema: {[x]: 1, ", 1), "cannot be read"),
        (GOOD.replace("schema: {", "schema: {'a': {", 1), "cannot be read"),
        (GOOD.replace("Input JSON schema:", "Schema:", 1), "cannot be read"),
    ],
)
def test_what_is_missing_or_unreadable_is_reported(prompt: str, expected: str) -> None:
    (line,) = check_prompts(rows(prompt), agent(), "train")
    assert expected in line


@pytest.mark.parametrize(
    "text",
    [
        "{" * 5000,
        "{'a': " * 3000,
        "{'",
        '{"a": "\\',
        "{1: 2}",
        "{'properties': [1], 'required': 3}",
    ],
)
def test_no_prompt_raises(text: str) -> None:
    prompt = listing("web", ("search", text), ("scrape", "{}"))
    assert len(check_prompts(rows(prompt), agent(), "train")) >= 1
    listed_tools(f"<tools>\n{text}\n[1]\nnull\n</tools>")
