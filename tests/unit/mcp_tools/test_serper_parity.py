"""The npm Serper server, the real one, against a local stand-in of the Serper service.

Proven: its contract is the one that MATPO was trained with and that our bundled server copies; what
each of the service's answers and faults becomes; that the key stays where it belongs; the default
web recipe. Not proven: that the service still answers as the stand-in does.

The recorded contract is always checked. The rest needs Node and the package, which `make setup`
installs where npm is (`MATPO_SERPER_SERVER` names a `build/index.js` elsewhere).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_matpo.agents.tools import ToolReply
from megatron_matpo.cache import ReplyCache
from megatron_matpo.config import load_recipe
from megatron_matpo.config.tools import CacheConfig, McpServerConfig, ToolsConfig
from megatron_matpo.errors import ToolError
from megatron_matpo.mcp_tools.corpus_server import TOOLS
from megatron_matpo.mcp_tools.toolbox import RunToolBox, open_tool_box
from tests.helpers.fake_serper import KEY, LEAK, FakeSerper, fake_serper

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "web_search.yaml"
NAME = "search_and_scrape_webpage"
Contract = dict[str, tuple[dict[str, str], list[str]]]

SERPER: Contract = {
    "google_search": (
        {
            "q": "string",
            "gl": "string",
            "hl": "string",
            "location": "string",
            "num": "number",
            "tbs": "string",
            "page": "number",
            "autocorrect": "boolean",
        },
        ["q", "gl", "hl"],
    ),
    "scrape": ({"url": "string", "includeMarkdown": "boolean"}, ["url"]),
}
"""Per tool: type of each argument, and the required ones. Source: version 0.1.2, `tools/list`."""


def contract(name: str, schema: dict[str, object]) -> Contract:
    properties = schema["properties"]
    assert isinstance(properties, dict)
    types = {argument: value["type"] for argument, value in properties.items()}
    return {name: (types, list(schema["required"]))}  # type: ignore[call-overload]


def test_the_bundled_tools_have_serpers_contract() -> None:
    ours: Contract = {}
    for tool in TOOLS:
        ours |= contract(tool["name"], tool["inputSchema"])
    assert ours == SERPER


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSerper]:
    monkeypatch.setenv("SERPER_API_KEY", KEY)
    with fake_serper() as fake:
        yield fake


def recipe_server(service: FakeSerper, **settings: object) -> McpServerConfig:
    """The recipe's own server, pointed at the stand-in."""
    server = load_recipe(str(RECIPE), []).tools.servers[NAME]
    assert server.command == "node" and server.env_from == ["SERPER_API_KEY"]
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    script = Path(os.environ.get("MATPO_SERPER_SERVER") or ROOT / server.args[0])
    if not script.is_file():
        pytest.skip(f"{server.args[0]} is not installed: `make setup` does it where npm is")
    changed: dict[str, object] = {"args": [str(script)], "env": service.env(), "backoff_s": 0.05}
    return replace(server, **(changed | {"start_timeout_s": 60.0} | settings))  # type: ignore


def with_tools(
    server: McpServerConfig,
    tmp_path: Path,
    body: Callable[[RunToolBox], Awaitable[object]],
    cache: CacheConfig | None = None,
) -> None:
    config = ToolsConfig({NAME: server}, cache=cache or CacheConfig())

    async def run() -> None:
        kept = ReplyCache(config.cache, tmp_path / "cache.sqlite")
        async with open_tool_box(config, tmp_path, kept) as tools:
            await body(tools)
        kept.close()

    asyncio.run(run())


async def search(tools: RunToolBox, query: str) -> ToolReply:
    return await tools.call(NAME, "google_search", {"q": query, "gl": "us", "hl": "en"})


def test_the_recipe_serves_search_and_scrape_without_leaks(
    tmp_path: Path, service: FakeSerper
) -> None:
    async def body(tools: RunToolBox) -> None:
        theirs: Contract = {}
        for spec in tools.specs():
            theirs |= contract(spec.name, dict(spec.input_schema))
        assert theirs == SERPER
        found = json.loads((await search(tools, "bell")).text)
        assert [item["link"] for item in found["organic"]] == ["https://en.wikipedia.org/wiki/Bell"]
        assert "knowledgeGraph" not in found and found["peopleAlsoAsk"] == []
        assert found["relatedSearches"] == [{"query": "bell loud"}]
        url = found["organic"][0]["link"]
        page = await tools.call(NAME, "scrape", {"url": url, "includeMarkdown": True})
        assert json.loads(page.text)["markdown"] == f"# Words of {url}"
        refused = await tools.call(NAME, "scrape", {"url": LEAK})
        assert refused.is_error
        assert tools.counters()["tools/urls_blocked"] == 4

    with_tools(recipe_server(service), tmp_path, body)
    assert [host for host, _ in service.requests] == ["google.serper.dev", "scrape.serper.dev"]
    assert service.requests[0][1] == {"q": "bell", "gl": "us", "hl": "en"}


def test_paid_replies_are_asked_for_once_and_replayed_without_the_service(
    tmp_path: Path, service: FakeSerper
) -> None:
    replies: list[ToolReply] = []

    async def body(tools: RunToolBox) -> None:
        replies.extend(await asyncio.gather(*(search(tools, "bell") for _ in range(8))))
        replies.append(await tools.call(NAME, "scrape", {"url": "https://a.example"}))

    with_tools(recipe_server(service), tmp_path, body, CacheConfig(mode="read_write"))
    assert service.credits == 1000 - 1 - 2
    service.credits = 0
    with_tools(recipe_server(service), tmp_path, body, CacheConfig(mode="replay"))
    assert replies[:9] == replies[9:]
    assert KEY.encode() not in (tmp_path / "cache.sqlite").read_bytes()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("400", ToolReply("400 Bad Request", True)),
        ("500", ToolReply("500 Internal Server Error", True)),
        ("echo", ToolReply("bad request with key ***", True)),
        ("403", "3 attempts; the service behind it failed"),
        ("credits", "Not enough credits"),
        ("429", "429 Too Many Requests"),
        ("503", "503 Service Unavailable"),
        ("reset", "the service behind it failed"),
        ("garbage", "invalid json response body"),
        ("hang", "no answer within tools.servers.search_and_scrape_webpage.call_timeout_s = 1.5 s"),
        ("drip", "no answer within"),
        ("429:2", ToolReply("All about fault:429:2", False)),
        ("reset:1", ToolReply("All about fault:reset:1", False)),
    ],
)
def test_what_the_services_faults_become(
    tmp_path: Path, service: FakeSerper, fault: str, expected: ToolReply | str
) -> None:
    """The tool's own errors are replies and asked once; outages are retried, then `ToolError`s."""

    async def body(tools: RunToolBox) -> None:
        if isinstance(expected, ToolReply):
            reply = await search(tools, f"fault:{fault}")
            assert expected.text in reply.text and reply.is_error == expected.is_error
        else:
            with pytest.raises(ToolError) as caught:
                await search(tools, f"fault:{fault}")
            assert expected in str(caught.value)
        assert not (await search(tools, "next")).is_error

    is_slow = fault in ("hang", "drip")
    limits = {"call_timeout_s": 1.5} if is_slow else {}
    with_tools(recipe_server(service, num_processes=1, **limits), tmp_path, body)
    is_final = isinstance(expected, ToolReply) and expected.is_error
    num_asked = {"429:2": 3, "reset:1": 2}.get(fault, 1 if is_final or is_slow else 3)
    assert len(service.requests) == num_asked + 1
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert KEY not in logs


def test_a_page_of_10_mb_is_cut_and_a_page_that_cannot_be_read_is_a_reply(
    tmp_path: Path, service: FakeSerper
) -> None:
    async def body(tools: RunToolBox) -> None:
        huge = await tools.call(NAME, "scrape", {"url": "fault:huge"})
        assert huge.text.endswith("characters shown]") and len(huge.text) < 20_100
        failed = await tools.call(NAME, "scrape", {"url": "fault:500"})
        assert failed.is_error and "Scraping failed." in failed.text

    with_tools(recipe_server(service), tmp_path, body)


def test_a_wrong_key_fails_calls_and_is_shown_nowhere(
    tmp_path: Path, service: FakeSerper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "wrong-key")

    async def body(tools: RunToolBox) -> None:
        with pytest.raises(ToolError, match="403 Forbidden") as caught:
            await search(tools, "bell")
        assert "wrong-key" not in str(caught.value)

    with_tools(recipe_server(service), tmp_path, body)
