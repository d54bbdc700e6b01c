"""Proves what the URL policy does to calls and replies, on replies in the shape of Serper's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from megatron_matpo.agents.tools import ToolReply, ToolSpec
from megatron_matpo.config.tools import UrlPolicyConfig
from megatron_matpo.mcp_tools.policy import PolicedToolBox

LEAK = "https://huggingface.co/datasets/gaia-benchmark/GAIA"
FINE = "https://en.wikipedia.org/wiki/Gaia"


class ScriptedToolBox:
    """Answers every call with the same reply, and counts the calls that reach it."""

    def __init__(self, text: str, is_error: bool = False) -> None:
        self.reply = ToolReply(text, is_error)
        self.num_calls = 0

    def specs(self) -> list[ToolSpec]:
        return [ToolSpec("web", "scrape", "", {})]

    async def call(self, server: str, tool: str, arguments: dict[str, Any]) -> ToolReply:
        self.num_calls += 1
        return self.reply


def call(
    text: str, arguments: dict[str, Any], config: UrlPolicyConfig | None = None
) -> tuple[ToolReply, int, int]:
    """(reply, calls made, addresses blocked)."""
    inner = ScriptedToolBox(text)
    box = PolicedToolBox(inner, config or UrlPolicyConfig())
    assert box.specs() == inner.specs()
    return asyncio.run(box.call("web", "tool", arguments)), inner.num_calls, box.num_blocked


def search(content: object, config: UrlPolicyConfig | None = None) -> tuple[Any, int]:
    """(what is left of a search reply, addresses blocked)."""
    reply, _, num_blocked = call(json.dumps(content), {"q": "gaia", "gl": "us"}, config)
    assert not reply.is_error
    return json.loads(reply.text), num_blocked


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": LEAK},
        {"url": "huggingface.co/datasets/x", "includeMarkdown": True},
        {"url": " HTTPS://HF.CO/datasets/x "},
        {"urls": [FINE, LEAK]},
        {"options": {"pageUrl": LEAK}},
        {"q": LEAK},
        {"url": "http://169.254.169.254/"},
        {"url": "file:///etc/passwd"},
        {"url": "https://good.example\\@huggingface.co/datasets"},
        {"url": "https://bit.ly/x"},
        {"source_uri": "data:text/html,x"},
    ],
)
def test_a_refused_address_is_not_opened_and_the_model_reads_why(arguments: dict[str, Any]) -> None:
    reply, num_calls, num_blocked = call("secret", arguments)
    assert reply.is_error and "was not opened" in reply.text and "secret" not in reply.text
    assert (num_calls, num_blocked) == (0, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": FINE},
        {"url": "doc-17"},
        {"url": "no address at all"},
        {"url": ""},
        {"q": f"what is on {LEAK} ?"},
        {"q": "site:huggingface.co/datasets gaia"},
        {"code": "print('http://localhost')"},
        {"path": "C:\\data", "query": "SELECT 'x://y'"},
    ],
)
def test_other_arguments_reach_the_tool_as_they_are(arguments: dict[str, Any]) -> None:
    assert call("text", arguments) == (ToolReply("text", False), 1, 0)


def test_results_are_dropped_wherever_they_are_in_a_search_reply() -> None:
    content = {
        "searchParameters": {"q": "gaia"},
        "knowledgeGraph": {"title": "GAIA", "description": "42", "descriptionLink": LEAK},
        "answerBox": {"answer": "42", "link": LEAK},
        "organic": [
            {"title": "leak", "link": LEAK.upper(), "snippet": "42"},
            {"title": "fine", "link": FINE, "position": 2},
            {"title": "links", "link": FINE, "sitelinks": [{"link": LEAK}, {"link": FINE}]},
            {"title": "picture", "link": FINE, "imageUrl": "https://x.hf.space/a.png"},
            {"title": "local", "link": "http://10.0.0.1/"},
        ],
        "peopleAlsoAsk": [{"question": "?", "snippet": "42", "link": LEAK}],
        "relatedSearches": [{"query": "gaia"}],
        "topStories": [LEAK, FINE],
        "credits": 1,
    }
    kept, num_blocked = search(content)
    assert kept == {
        "searchParameters": {"q": "gaia"},
        "organic": [
            {"title": "fine", "link": FINE, "position": 2},
            {"title": "links", "link": FINE, "sitelinks": [{"link": FINE}]},
            {"title": "picture", "link": FINE},
        ],
        "peopleAlsoAsk": [],
        "relatedSearches": [{"query": "gaia"}],
        "topStories": [FINE],
        "credits": 1,
    }
    assert num_blocked == 8


def test_an_allow_list_drops_the_rest_but_not_for_its_pictures() -> None:
    config = UrlPolicyConfig(allow=["wikipedia.org"])
    fine = {"link": FINE, "imageUrl": "https://cdn.example/x.png"}
    kept, num_blocked = search({"organic": [fine, {"link": "https://example.org"}]}, config)
    assert kept == {"organic": [{"link": FINE}]}
    assert num_blocked == 2


@pytest.mark.parametrize(
    "text",
    [
        '{"organic": [{"link":"https://en.wikipedia.org/"}],   "b": 1}',
        f"See {LEAK}.",
        "[not JSON",
        "",
        '{"version": "10.0.0.1", "link": "not a link", "n": 3, "none": null}',
        '{"title": "localhost", "url": "mailto:a@localhost"}',
    ],
)
def test_a_reply_without_refused_addresses_stays_byte_for_byte(text: str) -> None:
    assert call(text, {"q": "x"})[0] == ToolReply(text, False)


def test_error_replies_are_not_looked_into() -> None:
    inner = ScriptedToolBox(json.dumps({"link": LEAK}), is_error=True)
    box = PolicedToolBox(inner, UrlPolicyConfig())
    assert asyncio.run(box.call("web", "scrape", {"url": FINE})) == inner.reply


def test_a_page_loses_the_address_alone_but_a_page_from_elsewhere_goes_whole() -> None:
    page = {"text": "words", "jsonld": {"name": "x", "sameAs": [LEAK, FINE]}, "metadata": {}}
    reply, _, num_blocked = call(json.dumps(page), {"url": FINE})
    assert json.loads(reply.text) == page | {"jsonld": {"name": "x", "sameAs": [FINE]}}
    assert (reply.is_error, num_blocked) == (False, 1)
    page["metadata"] = {"og:url": "http://localhost:3000/"}
    assert "words" in call(json.dumps(page), {"url": FINE})[0].text
    page["metadata"] = {"og:url": LEAK}
    reply, _, num_blocked = call(json.dumps(page), {"url": "https://redirects.example/x"})
    assert (reply.is_error, num_blocked) == (True, 1)
    assert "words" not in reply.text


def test_each_of_several_json_values_is_looked_into() -> None:
    """What is left of a server's reply with one content item per result (`pool.reply_of`)."""
    results = [{"link": LEAK, "snippet": "42"}, {"link": FINE}, {"sitelinks": [{"link": LEAK}]}]
    reply, _, num_blocked = call("\n".join(map(json.dumps, results)), {"q": "gaia"})
    assert reply.text == '{\n  "link": "' + FINE + '"\n}\n{\n  "sitelinks": []\n}'
    assert (reply.is_error, num_blocked) == (False, 2)
    reply, _, num_blocked = call(json.dumps(results[0]) + "\n\n", {"q": "gaia"})
    assert (reply.is_error, num_blocked) == (True, 1)


def test_json_that_is_nested_too_deeply_to_be_judged_is_not_shown() -> None:
    for depth in (400, 900, 100_000):
        reply, _, num_blocked = call("[" * depth + f'"{LEAK}"' + "]" * depth, {"q": "x"})
        assert LEAK not in reply.text and num_blocked == 1


def test_everything_can_be_switched_off() -> None:
    off = UrlPolicyConfig(block_leaks=False, block_private=False)
    text = json.dumps({"organic": [{"link": LEAK}, {"link": "http://localhost"}]})
    assert call(text, {"url": "http://localhost"}, off) == (ToolReply(text, False), 1, 0)
