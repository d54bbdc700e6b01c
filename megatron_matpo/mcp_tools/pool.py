"""`McpToolBox`: all tool servers of a run, behind the tool box that the agents use.

Every server process is started once per run, at the same time as the others, and kept. Failures of
the infrastructure are `ToolError`s; what a tool has to say about its arguments is a reply that the
model reads.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mcp.shared.exceptions import MCPError
from mcp_types import CallToolResult, TextContent

from megatron_matpo.agents.tools import ToolReply, ToolSpec
from megatron_matpo.config.tools import McpServerConfig, ToolsConfig
from megatron_matpo.errors import ToolError
from megatron_matpo.mcp_tools.connection import Connection, ConnectionLostError
from megatron_matpo.mcp_tools.launch import plan_launch

MAX_ATTEMPTS = 3
"""Per call: the first one and two more, after transport errors only."""
OUTAGE_BACKOFF_S = 0.5

_log = logging.getLogger(__name__)
# JSON-RPC errors by which a server reports that the service behind it is down or refuses us.
# Source: Node's network error codes, and what Serper answers without credit or with a wrong key.
_OUTAGE = re.compile(
    r"\b(ETIMEDOUT|ECONNRESET|ECONNREFUSED|EHOSTUNREACH|ENETUNREACH|ENOTFOUND|EAI_AGAIN|EPIPE)\b"
    r"|socket hang up|fetch failed|API error: (401|402|403|429|502|503|504)\b"
    r"|^(unauthorized|not enough credits|rate limit|too many requests|service unavailable)\b",
    re.IGNORECASE,
)


def cut_text(text: str, max_chars: int) -> str:
    """`text`, or its first `max_chars` characters and a line that says so."""
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]}\n[... cut: {max_chars} of {len(text)} characters shown]"


def reply_of(result: CallToolResult, max_chars: int) -> ToolReply:
    """What the model reads of a tool's result: its texts, one per line."""
    parts = [
        item.text if isinstance(item, TextContent) else f"[{item.type} content is not shown]"
        for item in result.content
    ]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return ToolReply(cut_text("\n".join(parts), max_chars), result.is_error)


class _Server:
    """The processes of one server and its bound on concurrency."""

    def __init__(self, name: str, config: McpServerConfig, log_dir: Path) -> None:
        self.name = name
        self.config = config
        self._gate = asyncio.Semaphore(max(1, config.max_concurrency))
        self._changed = asyncio.Event()
        self._next = 0
        self.connections = [
            Connection(
                plan_launch(name, index, config, log_dir),
                config.start_timeout_s,
                self._changed.set,
            )
            for index in range(max(1, config.num_processes))
        ]

    async def call(self, tool: str, arguments: dict[str, Any]) -> CallToolResult | MCPError:
        """The result, or the error by which the server rejected the call.

        Raises:
            ToolError: deadline, outage, or the process died in every attempt.
        """
        async with self._gate:
            timeout_s = self.config.call_timeout_s
            connection: Connection | None = None
            try:
                async with asyncio.timeout(timeout_s):
                    for attempt in range(1, MAX_ATTEMPTS + 1):
                        connection = await self._ready()
                        last = attempt == MAX_ATTEMPTS
                        try:
                            return await connection.call(tool, arguments)
                        except ConnectionLostError:
                            _log.warning("%s: lost during a call", connection.launch.name)
                            connection_lost = connection
                        except MCPError as error:
                            if not _OUTAGE.search(error.message):
                                return error
                            if last:
                                raise ToolError(self._outage_text(error)) from error
                            await asyncio.sleep(OUTAGE_BACKOFF_S * 4 ** (attempt - 1))
                    raise ToolError(
                        f"{self.name}/{tool}: the server died in each of {MAX_ATTEMPTS} attempts; "
                        f"the last time: {connection_lost.last_error or 'it broke the connection'}"
                    )
            except TimeoutError as error:
                if connection is not None:
                    connection.suspect()
                raise ToolError(
                    f"{self.name}/{tool}: no answer within "
                    f"tools.servers.{self.name}.call_timeout_s = {timeout_s:g} s"
                ) from error
            except (ValueError, RuntimeError) as error:
                if isinstance(error, ToolError):
                    raise
                raise ToolError(
                    f"{self.name}/{tool}: the server broke the protocol: {str(error)[:500]}"
                ) from error

    def _outage_text(self, error: MCPError) -> str:
        return f"tool server {self.name!r}: the service behind it failed: {error.message[:500]}"

    async def _ready(self) -> Connection:
        """The usable process with the fewest calls; waits for a restart if there is none."""
        while True:
            ready = [item for item in self.connections if item.is_ready]
            if ready:
                self._next += 1  # equals take turns
                turn = self._next % len(ready)
                return min(ready[turn:] + ready[:turn], key=lambda item: item.in_flight)
            if all(item.is_closed for item in self.connections):
                raise ToolError(f"tool server {self.name!r} is closed")
            if all(item.is_hopeless for item in self.connections):
                raise ToolError(
                    f"tool server {self.name!r} keeps dying; the last time: "
                    f"{self.connections[0].last_error}"
                )
            self._changed.clear()
            await self._changed.wait()


class McpToolBox:
    """Tool servers of a run; use as an async context manager, or `start` and `close`."""

    def __init__(self, config: ToolsConfig, log_dir: str | Path) -> None:
        """`log_dir` receives `tool-NAME-i.log` with the stderr of each process.

        Raises:
            ToolError: a server has no command, or a variable of `env_from` is not set.
        """
        self._max_chars = config.result_max_chars
        self._servers = {
            name: _Server(name, server, Path(log_dir)) for name, server in config.servers.items()
        }

    async def __aenter__(self) -> Self:
        """Start all servers."""
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Stop all servers."""
        await self.close()

    async def start(self) -> None:
        """Start all processes of all servers at once.

        Raises:
            ToolError: names every server that did not start; the others are stopped again.
        """
        try:
            outcomes = await asyncio.gather(
                *(connection.start() for connection in self._connections()), return_exceptions=True
            )
        except asyncio.CancelledError:
            await self.close()  # the caller will not: it never got a started tool box
            raise
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if not errors:
            return
        await self.close()
        for error in errors:
            if not isinstance(error, ToolError):
                raise error
        text = "\n".join(dict.fromkeys(str(error) for error in errors))
        for connection in self._connections():
            text = connection.launch.redact(text)
        raise ToolError(text)

    async def close(self) -> None:
        """Stop all processes; on return none is left. A second call does nothing."""
        await asyncio.gather(*(connection.close() for connection in self._connections()))

    def specs(self) -> list[ToolSpec]:
        """All tools, in the order of the recipe's servers and of each server's list."""
        return [
            ToolSpec(name, tool.name, tool.description or "", dict(tool.input_schema))
            for name, server in self._servers.items()
            for tool in server.connections[0].tools
        ]

    async def call(self, server: str, tool: str, arguments: dict[str, Any]) -> ToolReply:
        """Call a tool. `is_error` replies are the tool's own: bad arguments, unknown page, ...

        Raises:
            ToolError: infrastructure: deadline, dead server, outage of the service behind it.
        """
        target = self._servers.get(server)
        if target is None:
            raise ToolError(f"no tool server is called {server!r}")
        # Whatever a server says reaches the model and the recorded rollouts, so that a server that
        # quotes its key in an error must not spread it.
        redact = target.connections[0].launch.redact
        try:
            outcome = await target.call(tool, arguments)
        except ToolError as error:
            raise ToolError(redact(str(error))) from None
        if isinstance(outcome, MCPError):
            reply = ToolReply(cut_text(f"Error: {outcome.message}", self._max_chars), True)
        else:
            reply = reply_of(outcome, self._max_chars)
        return replace(reply, text=redact(reply.text))

    @property
    def num_restarts(self) -> int:
        """Processes that were started again since `start`."""
        return sum(connection.num_restarts for connection in self._connections())

    def pids(self) -> list[int]:
        """Process ids of the running servers."""
        return [item.pid for item in self._connections() if item.pid is not None]

    def _connections(self) -> list[Connection]:
        return [item for server in self._servers.values() for item in server.connections]
