"""The tool box of a run, put together in one place.

From the outside in: long replies are cut, addresses are policed, replies of paid services are
cached, and MCP servers answer. Filtering sees whole replies (cut JSON cannot be filtered), and the
cache holds them as they came, so that a change of the policy or of the cut keeps it valid.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_matpo.agents.tools import ToolBox, ToolReply, ToolSpec, cut_mark
from megatron_matpo.cache import ReplyCache
from megatron_matpo.config.tools import ToolsConfig
from megatron_matpo.mcp_tools.policy import PolicedToolBox
from megatron_matpo.mcp_tools.pool import McpToolBox

MAX_KEPT_CHARS = 2**22
"""Longer replies are not cached: they are cut to a small part of that anyway."""


def cut_text(text: str, max_chars: int) -> str:
    """`text`, or its first `max_chars` characters and a line that says so."""
    if len(text) <= max_chars:
        return text
    return text[:max_chars] + cut_mark(max_chars, len(text))


class CachedToolBox:
    """A tool box that keeps the replies of some tools. Error replies are not kept."""

    def __init__(self, inner: ToolBox, cache: ReplyCache, tools: Sequence[str]) -> None:
        """Keep what the tools called `tools` answer, by server and arguments."""
        self._inner = inner
        self._cache = cache
        self._tools = frozenset(tools)

    def specs(self) -> list[ToolSpec]:
        """As `ToolBox.specs`."""
        return self._inner.specs()

    async def call(self, server: str, tool: str, arguments: dict[str, Any]) -> ToolReply:
        """As `ToolBox.call`.

        Raises:
            CacheMissError: offline replay, and there is no reply to this call.
        """
        if tool not in self._tools:
            return await self._inner.call(server, tool, arguments)
        answered: ToolReply | None = None

        async def ask() -> tuple[str, bool]:
            nonlocal answered
            answered = await self._inner.call(server, tool, arguments)
            is_kept = not answered.is_error and len(answered.text) <= MAX_KEPT_CHARS
            return answered.text, is_kept

        request = {"server": server, "arguments": arguments}
        text = await self._cache.fetch(tool, request, ask)
        return answered if answered is not None else ToolReply(text, is_error=False)


class RunToolBox:
    """All tools of a run, as its agents see them."""

    def __init__(self, servers: McpToolBox, config: ToolsConfig, cache: ReplyCache) -> None:
        """Wrap started `servers`."""
        self._servers = servers
        self._cache = cache
        self._cached_tools = tuple(config.cache.tools)
        self._max_chars = config.result_max_chars
        cached = CachedToolBox(servers, cache, config.cache.tools)
        self._policed = PolicedToolBox(cached, config.urls)

    def specs(self) -> list[ToolSpec]:
        """As `ToolBox.specs`."""
        return self._policed.specs()

    async def call(self, server: str, tool: str, arguments: dict[str, Any]) -> ToolReply:
        """As `ToolBox.call`."""
        reply = await self._policed.call(server, tool, arguments)
        return replace(reply, text=cut_text(reply.text, self._max_chars))

    def counters(self) -> dict[str, float]:
        """Running totals by metric name; a step's numbers are differences."""
        return {
            "tools/cache_hits": sum(self._cache.hits[name] for name in self._cached_tools),
            "tools/cache_misses": sum(self._cache.misses[name] for name in self._cached_tools),
            "tools/urls_blocked": self._policed.num_blocked,
            "tools/restarts": self._servers.num_restarts,
            "tools/breaker_open": self._servers.num_breaker_openings,
        }


@asynccontextmanager
async def open_tool_box(
    config: ToolsConfig, log_dir: Path, cache: ReplyCache
) -> AsyncIterator[RunToolBox]:
    """Start the servers of `config`, and stop them at the end. The cache stays the caller's.

    Raises:
        ToolError: names every server that did not start.
    """
    async with McpToolBox(config, log_dir) as servers:
        yield RunToolBox(servers, config, cache)
