"""Proves the `<tool_call>` format: every kind of block, its texts, and whole episodes in it.

That Qwen's template writes tools and replies so was read from the template; the copy below follows
it in what concerns tools. The engine and the tools of the episodes are fakes.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tokenizers import AddedToken

from megatron_matpo.agents import prompts
from megatron_matpo.agents.grammar import CallOutcome, ParsedCall
from megatron_matpo.agents.json_calls import JsonCalls
from megatron_matpo.agents.roster import make_roster
from megatron_matpo.agents.xml_calls import XmlCalls
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.data.chat import Chat
from megatron_matpo.data.tokenizer import Tokenizer
from megatron_matpo.errors import ConfigError
from megatron_matpo.types import Status, TurnKind
from tests.helpers.play import ENDS, ROLLOUT, SINGLE, by_role, play, write_call
from tests.helpers.rollouts import (
    CHATML,
    LLAMA3,
    MISTRAL,
    THINKING,
    FakeToolBox,
    byte_tokenizer,
    make_chat,
    make_tokenizer,
    search,
)

JSON = JsonCalls()
SPECS = FakeToolBox().specs()
NATIVE = replace(ROLLOUT, call_format="tool_call")
QWEN = """\
{%- for m in messages %}
  {%- if m.role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}
    {%- endif %}
    {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}
    {%- endif %}
  {%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""


def block(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


def native(name: str = "search", **arguments: object) -> str:
    return block(json.dumps({"name": name, "arguments": arguments}))


GOOD = native(q="x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 4.", []),
        (GOOD, ["ok"]),
        (f"Let me look.\n{GOOD}\n{native('add', a=1, b=2.5)} words", ["ok", "ok"]),
        (GOOD.replace("\n", ""), ["ok"]),
        (GOOD.replace("\n", " \r\n\t"), ["ok"]),
        (native(q="</tool_call> <tool_call> <think>"), ["ok"]),
        (block('{"arguments": {"q": "x"}, "name": "search"}'), ["ok"]),
        (native(q="x", num=3), ["ok"]),
        (native(), ["missing_argument"]),
        (native(q="x", hl="en"), ["unknown_argument"]),
        (native(q=7), ["mistyped_argument"]),
        (native("fetch", q="x"), ["unknown_tool"]),
        (native("search_and_browse", subtask="x"), ["unknown_tool"]),
        (block('{"name": "search", "arguments": "{}"}'), ["not_an_object"]),
        (block('{"name": "fetch", "arguments": []}'), ["not_an_object"]),
        (block('["search"]'), ["not_an_object"]),
        (block('{"name": "search"}'), ["malformed"]),
        (block('{"name": 3, "arguments": {}}'), ["malformed"]),
        (block('{"name": "search", "arguments": {"q": "x"}, "id": 1}'), ["malformed"]),
        (block('{"name": "search", "arguments": {"q": x}}'), ["bad_json"]),
        (block("{'name': 'search', 'arguments': {'q': 'x'}}"), ["bad_json"]),
        (block('{"name": "search", "arguments": {"q": NaN}}'), ["bad_json"]),
        (block('{"name": "search", "arguments": {"q": "\\ud800"}}'), ["bad_json"]),
        (block(GOOD[12:-13] + " and more"), ["bad_json"]),
        (block("[" * 20000), ["bad_json"]),
        (block(""), ["bad_json"]),
        (GOOD.removesuffix("</tool_call>"), ["unclosed"]),
        ("<tool_call>", ["unclosed"]),
        (GOOD.removesuffix("</tool_call>") + GOOD, ["unclosed", "ok"]),
        (block(GOOD), ["nested"]),
        ("</tool_call>", ["malformed"]),
        (search("x"), ["foreign_syntax"]),
        (f"{GOOD}{search('x')}{GOOD}", ["ok", "foreign_syntax", "ok"]),
        (f"<think>{GOOD}</think>Done.", []),
        (f"<think>hm</think>{GOOD}", ["ok"]),
        (f"{GOOD}</think>{GOOD}", ["ok"]),
    ],
)
def test_outcomes(text: str, expected: list[str]) -> None:
    assert [str(call.outcome) for call in JSON.parse(text, SPECS)] == expected


def test_a_call_is_foreign_to_the_other_format_in_both_directions() -> None:
    for grammar, other in ((JSON, search("x")), (XmlCalls(), GOOD)):
        (call,) = grammar.parse(other, SPECS)
        assert call.outcome is CallOutcome.FOREIGN_SYNTAX
        assert f"{grammar.markers[1]} is not the call format" in prompts.correction(call, grammar)
        assert grammar.example in prompts.correction(call, grammar)


def test_the_server_of_a_call_is_that_of_its_tool() -> None:
    assert JSON.parse(GOOD, SPECS) == [
        ParsedCall(CallOutcome.OK, "web", "search", {"q": "x"}),
    ]
    (bad,) = JSON.parse(GOOD.replace('"x"', "x"), SPECS)
    assert (bad.server, bad.tool) == ("", "search")
    assert prompts.correction(bad, JSON).startswith(
        "search was not executed: the call is not valid JSON: Expecting value.\nA call has this "
        'form:\n<tool_call>\n{"name": "TOOL", "arguments": {"ARGUMENT": "VALUE"}}\n</tool_call>'
    )


def test_calls_are_removed_from_reports() -> None:
    assert JSON.without_calls(f"a {GOOD} b {GOOD}") == "a  b"
    assert JSON.without_calls("a <tool_call> b") == "a <tool_call> b"
    assert JSON.without_calls(f"a {GOOD.replace('x', 'x </tool_call> y')} b") == "a  b"


def test_the_tool_list_is_what_qwens_template_writes() -> None:
    assert JSON.system_prompt("Be good.", SPECS[1:2]) == (
        "Be good.\n\n# Tools\n\nYou may call one or more functions to assist with the user query."
        "\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "scrape", "description": "Read a page.", '
        '"parameters": {"type": "object", "properties": {"url": {"type": "string"}}, '
        '"required": ["url"]}}}\n</tools>\n\nFor each function call, return a json object with '
        "function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )
    assert JSON.system_prompt("Be good.", []) == "Be good.\n\nThere are no tools."


def test_replies_are_what_qwens_template_writes_for_tool_messages() -> None:
    tokenizer = make_tokenizer(QWEN)
    messages = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": GOOD},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
    ]
    text = tokenizer.render(messages, add_generation_prompt=True)
    expected = text.partition(GOOD)[2].removeprefix("<|im_end|>")
    chat = Chat(tokenizer)
    _, got = chat.environment_ids(JSON.wrap(["one", "two"]), [chat.end_of_turn_id])
    assert got == expected


def test_a_reply_cannot_end_its_block() -> None:
    (message,) = JSON.wrap(["a</tool_response>\n<tool_response>\nb"])
    assert message.count("</tool_response>") == message.count("<tool_response>") == 1
    assert "b" in message


def test_tools_of_one_agent_need_names_of_their_own() -> None:
    agents = {
        "planner": AgentConfig(role="planner", tools=["web", "calc", "helper"]),
        "helper": AgentConfig(role="worker", tools=["web"], tool_name="add"),
    }
    with pytest.raises(
        ConfigError,
        match=r"agents\.planner\.tools: calc and helper both have a tool named add.*=tool_call",
    ):
        make_roster(agents, NATIVE, SPECS)
    make_roster(agents, ROLLOUT, SPECS)


@pytest.mark.parametrize("template", [CHATML, THINKING, LLAMA3, MISTRAL])
@pytest.mark.parametrize("call_format", ["mcp_xml", "tool_call"])
def test_an_episode_in_every_family(template: str, call_format: str) -> None:
    """Two workers at once, a bad call corrected, and a context that only grows."""

    def write(server: str, tool: str, **arguments: object) -> str:
        return write_call(call_format, server, tool, **arguments)

    both = "".join(write("browser", "search_and_browse", subtask=text) for text in ("a", "b"))
    planner = [f"</think>{both}", "</think>It is \\boxed{Ada}"]
    worker = [
        f"</think>{write('web', 'search', p='x')}",
        f"</think>{write('web', 'search', q='x')}",
    ]
    worker.append("<think>hm</think>\n\nThe page says Ada.")
    rollout = replace(ROLLOUT, call_format=call_format, prompts="rendered")
    tree, engine, tools = play(by_role(planner, worker), template=template, rollout=rollout)
    assert tree.planner.status is Status.ANSWERED and tree.said == "It is \\boxed{Ada}"
    assert len(tree.workers) == 2 and len(tools.seen) == 2
    for item in (tree.planner, *tree.workers):
        seen: list[int] = []
        contexts = [context for name, context in engine.contexts if name == item.id]
        for context, output in zip(contexts, engine.outputs[item.id], strict=True):
            assert context[: len(seen)] == seen
            seen = context + output
        assert item.token_ids == seen
        assert item.turns[-1].text.endswith(ENDS[template])
    reply = next(t for t in tree.planner.turns if t.kind is TurnKind.ENVIRONMENT)
    assert reply.text.count("The page says Ada.") == 2 and "hm" not in reply.text
    in_one = call_format == "tool_call" or template == MISTRAL
    chat = make_chat(template)
    start = chat.environment_ids(["one"], [chat.end_of_turn_id])[1].partition("one")[0].strip()
    assert reply.text.count(start) == (1 if in_one else 2)
    assert reply.text.count("<tool_response>") == (2 if call_format == "tool_call" else 0)
    corrected = tree.workers[0].turns[2].text
    assert "search was not executed: required arguments are missing: q" in corrected
    assert tree.workers[0].format_score == 0.5
    example = "<tool_call>\n" if call_format == "tool_call" else "<use_mcp_tool>\n"
    assert example in tree.planner.turns[0].text and example in tree.workers[0].turns[0].text


def test_foreign_calls_of_an_episode_are_scored_as_the_grammar_says() -> None:
    agents = {"planner": replace(SINGLE["planner"], max_invalid_calls=2)}
    turns = by_role([search("x"), GOOD, "done"], [])
    tree, _, tools = play(turns, agents, rollout=NATIVE)
    assert [call.outcome for call in tree.planner.calls] == ["foreign_syntax", "ok"]
    assert tree.planner.format_score == 0.5 and len(tools.seen) == 1


def test_tags_may_be_special_tokens_of_the_tokenizer() -> None:
    """They are part of what a turn says, and neither stripped from it nor broken in replies."""
    backend = byte_tokenizer()
    tags = ("<tool_call>", "</tool_call>", "<tool_response>", "</think>")
    backend.add_special_tokens([AddedToken(tag, special=True) for tag in tags])
    chat = Chat(Tokenizer(backend, CHATML, {}))
    assert chat.visible(f"{GOOD}<|im_end|>") == GOOD
    assert "<tool_response>\none\n" in chat.environment_ids(JSON.wrap(["one"]), [])[1]
