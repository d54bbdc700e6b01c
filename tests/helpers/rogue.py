"""Starts `rogue_server.py`, a real MCP server over stdio that misbehaves on demand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from megatron_matpo.config.tools import McpServerConfig, ToolsConfig
from megatron_matpo.errors import ToolError
from megatron_matpo.mcp_tools.pool import McpToolBox

ROGUE = str(Path(__file__).parents[1] / "unit" / "mcp_tools" / "rogue_server.py")


def rogue(*arguments: str, **settings: object) -> McpServerConfig:
    """Its configuration, with deadlines that a busy machine keeps."""
    defaults: dict[str, object] = {"start_timeout_s": 20.0, "call_timeout_s": 20.0}
    return McpServerConfig("python", [ROGUE, *arguments], **(defaults | settings))  # type: ignore


def with_box(
    tmp_path: Path,
    servers: dict[str, McpServerConfig],
    body: Callable[[McpToolBox], Awaitable[object]],
) -> None:
    """Run `body` with started servers; afterwards none of them may be left."""

    async def run() -> None:
        box = McpToolBox(ToolsConfig(servers), tmp_path)
        async with box:
            pids = box.pids()
            await body(box)
            pids += box.pids()
        assert not [pid for pid in pids if psutil.pid_exists(pid)]
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    asyncio.run(run())


def failing_start(tmp_path: Path, config: McpServerConfig) -> tuple[str, float]:
    """(message, seconds) of a start that must fail; no child may be left."""

    async def run() -> str:
        with pytest.raises(ToolError) as caught:
            await McpToolBox(ToolsConfig({"web": config}), tmp_path).start()
        return str(caught.value)

    begin = time.perf_counter()
    message = asyncio.run(run())
    took_s = time.perf_counter() - begin
    assert "'web'" in message
    assert not [item for item in psutil.Process().children() if ROGUE in item.cmdline()]
    return message, took_s
