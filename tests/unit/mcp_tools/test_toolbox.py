"""Proves the run's tool box against a real server: what is cached, filtered, cut and counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from megatron_matpo.cache import ReplyCache
from megatron_matpo.config.tools import CacheConfig, McpServerConfig, ToolsConfig, UrlPolicyConfig
from megatron_matpo.errors import CacheMissError
from megatron_matpo.mcp_tools.toolbox import RunToolBox, cut_text, open_tool_box
from megatron_matpo.rollout.metrics import MeteredToolBox
from tests.helpers.rogue import rogue

LEAK = "https://huggingface.co/datasets/gaia-benchmark/GAIA"
SEARCH = {"q": "bell", "gl": "us", "hl": "en"}


def corpus(tmp_path: Path) -> McpServerConfig:
    rows = [
        {"url": LEAK, "title": "Answers", "text": "The bell is loud."},
        {"url": "https://smallworld.example/bell", "title": "Bell", "text": "A bell. " * 50},
    ]
    documents = tmp_path / "docs.jsonl"
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = "megatron_matpo.mcp_tools.corpus_server"
    return McpServerConfig("python", ["-m", module, "--documents", str(documents)])


def with_tools(
    config: ToolsConfig, tmp_path: Path, body: Callable[[RunToolBox], Awaitable[object]]
) -> None:
    async def run() -> None:
        cache = ReplyCache(config.cache, tmp_path / "cache.sqlite")
        async with open_tool_box(config, tmp_path, cache) as tools:
            await body(tools)
        cache.close()

    asyncio.run(run())


def test_json_is_filtered_whole_and_cut_afterwards(tmp_path: Path) -> None:
    async def whole(tools: RunToolBox) -> None:
        reply = await tools.call("web", "google_search", SEARCH)
        links = [item["link"] for item in json.loads(reply.text)["organic"]]
        assert links == ["https://smallworld.example/bell"]
        refused = await tools.call("web", "scrape", {"url": LEAK})
        assert refused.is_error and "was not opened" in refused.text
        assert tools.counters()["tools/urls_blocked"] == 2

    async def cut(tools: RunToolBox) -> None:
        reply = await tools.call("web", "google_search", SEARCH)
        assert LEAK not in reply.text and "huggingface" not in reply.text
        text, _, mark = reply.text.rpartition("\n")
        assert len(text) == 200 and mark.startswith("[... cut: 200 of ")

    servers = {"web": corpus(tmp_path)}
    with_tools(ToolsConfig(servers), tmp_path, whole)
    with_tools(ToolsConfig(servers, result_max_chars=200), tmp_path, cut)
    assert cut_text("abc", 3) == "abc"


def test_raw_replies_are_cached_and_replayed_under_another_policy_and_cut(tmp_path: Path) -> None:
    servers = {"web": corpus(tmp_path)}
    replies: list[str] = []

    async def twice(tools: RunToolBox) -> None:
        metered = MeteredToolBox(tools)
        for _ in range(2):
            replies.append((await metered.call("web", "google_search", SEARCH)).text)
            bad = await metered.call("web", "scrape", {"url": "https://other.example"})
            assert bad.is_error, "errors are not kept, and stay errors"
        metrics = metered.metrics()
        assert (metrics["tools/cache_hits"], metrics["tools/cache_misses"]) == (1, 3)
        assert (metrics["tools/calls"], metrics["tools/errors"]) == (4, 2)
        assert MeteredToolBox(tools).metrics()["tools/cache_misses"] == 0, "a step of its own"

    async def replay(tools: RunToolBox) -> None:
        reply = await tools.call("web", "google_search", dict(reversed(SEARCH.items())))
        assert LEAK in reply.text
        with pytest.raises(CacheMissError, match="'scrape'"):
            await tools.call("web", "scrape", {"url": "https://smallworld.example/bell"})

    recording = CacheConfig(mode="read_write")
    with_tools(ToolsConfig(servers, cache=recording), tmp_path, twice)
    assert replies[0] == replies[1]
    replaying = CacheConfig(mode="replay")
    open_policy = UrlPolicyConfig(block_leaks=False)
    with_tools(ToolsConfig(servers, cache=replaying, urls=open_policy), tmp_path, replay)


def test_tools_that_are_not_named_are_not_cached(tmp_path: Path) -> None:
    async def body(tools: RunToolBox) -> None:
        pids = {(await tools.call("a", "pid", {})).text for _ in range(2)}
        assert len(pids) == 1
        await tools.call("a", "die_once", {"marker": str(tmp_path / "marker")})
        assert (await tools.call("a", "pid", {})).text not in pids
        counters = tools.counters()
        assert counters["tools/cache_misses"] == 0
        assert counters["tools/restarts"] == 1
        assert counters["tools/breaker_open"] == 0

    config = ToolsConfig({"a": rogue()}, cache=CacheConfig(mode="read_write"))
    with_tools(config, tmp_path, body)
