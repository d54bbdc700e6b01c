"""`McpToolBox`: all tool servers of a run, behind the tool box that the agents use.

Every server is started (stdio) or connected to (streamable HTTP) once per run, at the same time as
the others, and kept. Failures of the infrastructure are `ToolError`s; what a tool has to say about
its arguments is a reply that the model reads. Replies are whole: `toolbox` filters and cuts them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mcp.shared.exceptions import MCPError
from mcp_types import CallToolResult, TextContent

from megatron_matpo.agents.tools import ToolReply, ToolSpec
from megatron_matpo.config.tools import McpServerConfig, ToolsConfig
from megatron_matpo.errors import ToolError
from megatron_matpo.mcp_tools.breaker import Breaker
from megatron_matpo.mcp_tools.connection import Connection, ConnectionLostError
from megatron_matpo.mcp_tools.launch import plan_launch
from megatron_matpo.mcp_tools.process import ServerProcess
from megatron_matpo.mcp_tools.remote import HttpLink, plan_remote
from megatron_matpo.obs.spans import note, place

_SHOWN_ERROR_CHARS = 500

_log = logging.getLogger(__name__)
# JSON-RPC errors by which a server reports that the service behind it is down or refuses us.
# Source: Node's network error codes, node-fetch's messages, and what Serper answers without credit
# (400) or with a wrong key (403).
_OUTAGE = re.compile(
    r"\b(ETIMEDOUT|ECONNRESET|ECONNREFUSED|EHOSTUNREACH|ENETUNREACH|ENOTFOUND|EAI_AGAIN|EPIPE)\b"
    r"|socket hang up|fetch failed|premature close|invalid json response body"
    r"|API error: (401|402|403|429|502|503|504)\b|\bnot enough credits\b"
    r"|^(unauthorized|rate limit|too many requests|service unavailable)\b",
    re.IGNORECASE,
)


def is_outage(
    message: str, arguments: Mapping[str, Any], pattern: re.Pattern[str] = _OUTAGE
) -> bool:
    """Whether a server's error is about the service behind it; what it quotes does not count."""
    for value in arguments.values():
        if isinstance(value, str) and pattern.search(value):
            message = message.replace(value, "")
    return pattern.search(message) is not None


def reply_of(result: CallToolResult) -> ToolReply:
    """What the model reads of a tool's result: its texts, one per line."""
    parts = [
        item.text if isinstance(item, TextContent) else f"[{item.type} content is not shown]"
        for item in result.content
    ]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return ToolReply("\n".join(parts), result.is_error)


class _Server:
    """The connections of one server, its bound on concurrency and its circuit breaker."""

    def __init__(self, name: str, config: McpServerConfig, log_dir: Path) -> None:
        self.name = name
        self.config = config
        self.breaker = Breaker(config.breaker_failures, config.breaker_reset_s, time.monotonic)
        self._gate = asyncio.Semaphore(config.max_concurrency)
        self._changed = asyncio.Event()
        self._next = 0
        self._last_failure = ""
        self._outage = re.compile(config.outage_pattern) if config.outage_pattern else None
        count = range(config.num_processes)
        self.connections = [
            _make_connection(name, index, config, log_dir, self._changed.set) for index in count
        ]

    def _fits(self, message: str, arguments: Mapping[str, Any]) -> bool:
        """Whether the recipe says that such an error of this server is an outage."""
        return self._outage is not None and is_outage(message, arguments, self._outage)

    def redact(self, text: str) -> str:
        """`text` without the server's secrets, whoever quotes them."""
        return self.connections[0].target.redact(text)

    async def call(self, tool: str, arguments: dict[str, Any]) -> CallToolResult | MCPError:
        """The result, or the error by which the server rejected the call.

        Raises:
            ToolError: deadline, outage, the server was lost in every attempt, or its breaker is
                open.
        """
        self._check_breaker()  # also before the gate, where failing calls may hold all places
        async with place(self._gate, "wait for a place at the server"):
            self._check_breaker()
            self.breaker.try_begin()
            try:
                outcome = await self._call(tool, arguments)
            except ToolError as error:
                self._last_failure = str(error)[:_SHOWN_ERROR_CHARS]
                self.breaker.failed()
                raise
            except BaseException:
                self.breaker.abandoned()
                raise
            self.breaker.succeeded()
            return outcome

    def _check_breaker(self) -> None:
        wait_s = self.breaker.wait_s()
        if wait_s > 0:
            raise ToolError(
                f"tool server {self.name!r}: not called, its circuit breaker is open for another "
                f"{wait_s:.1f} s (tools.servers.{self.name}.breaker_failures = "
                f"{self.config.breaker_failures} calls in a row failed; the last: "
                f"{self._last_failure})"
            )

    async def _call(self, tool: str, arguments: dict[str, Any]) -> CallToolResult | MCPError:
        config = self.config
        connection: Connection | None = None
        problem = ""
        try:
            async with asyncio.timeout(config.call_timeout_s):
                for attempt in range(config.max_attempts):
                    if attempt > 0:
                        note(attempts=attempt + 1)
                        await asyncio.sleep(self._pause_s(attempt))
                    connection = await self._ready()
                    try:
                        result = await connection.call(tool, arguments)
                        if not (result.is_error and self._fits(reply_of(result).text, arguments)):
                            return result
                        message = reply_of(result).text[:_SHOWN_ERROR_CHARS]
                        problem = f"the service behind it failed: {message}"
                    except ConnectionLostError as error:
                        lost = str(error) or connection.last_error or "it broke the connection"
                        problem = f"the server was lost: {lost}"
                        _log.warning("%s: lost during a call", connection.target.name)
                    except MCPError as error:
                        message = error.message
                        if not (is_outage(message, arguments) or self._fits(message, arguments)):
                            return error
                        message = message[:_SHOWN_ERROR_CHARS]
                        problem = f"the service behind it failed: {message}"
            raise ToolError(f"{self.name}/{tool}: {config.max_attempts} attempts; {problem}")
        except TimeoutError as error:
            if connection is not None:
                connection.suspect()
            before = f"; before that, {problem}" if problem else ""
            raise ToolError(
                f"{self.name}/{tool}: no answer within "
                f"tools.servers.{self.name}.call_timeout_s = {config.call_timeout_s:g} s{before}"
            ) from error
        except (ValueError, RuntimeError) as error:
            if isinstance(error, ToolError):
                raise
            raise ToolError(
                f"{self.name}/{tool}: the server broke the protocol: "
                f"{str(error)[:_SHOWN_ERROR_CHARS]}"
            ) from error

    def _pause_s(self, num_failed: int) -> float:
        """Grows twofold, with jitter, so that callers who failed together come back apart."""
        return self.config.backoff_s * 2 ** (num_failed - 1) * random.uniform(0.5, 1.5)

    async def _ready(self) -> Connection:
        """The usable connection with the fewest calls; waits for a restart if there is none."""
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


def _make_connection(
    name: str, index: int, config: McpServerConfig, log_dir: Path, on_change: Callable[[], None]
) -> Connection:
    if config.url:
        remote = plan_remote(name, index, config)
        opener = partial(HttpLink.open, remote)
        return Connection(remote, opener, config.start_timeout_s, on_change)
    launch = plan_launch(name, index, config, log_dir)
    spawner = partial(ServerProcess.spawn, launch)
    return Connection(launch, spawner, config.start_timeout_s, on_change)


class McpToolBox:
    """Tool servers of a run; use as an async context manager, or `start` and `close`."""

    def __init__(self, config: ToolsConfig, log_dir: str | Path) -> None:
        """`log_dir` receives `tool-NAME-i.log` with the stderr of each process.

        Raises:
            ToolError: a server has no command, or a variable of `env_from` or `headers_from` is
                not set.
        """
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
            text = connection.target.redact(text)
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
        try:
            outcome = await target.call(tool, arguments)
        except ToolError as error:
            raise ToolError(target.redact(str(error))) from None
        if isinstance(outcome, MCPError):
            return ToolReply(target.redact(f"Error: {outcome.message}"), True)
        reply = reply_of(outcome)
        return replace(reply, text=target.redact(reply.text))

    @property
    def num_restarts(self) -> int:
        """Processes that were started again, and sessions that were opened again."""
        return sum(connection.num_restarts for connection in self._connections())

    @property
    def num_breaker_openings(self) -> int:
        """How often a server's circuit breaker opened."""
        return sum(server.breaker.num_opened for server in self._servers.values())

    def pids(self) -> list[int]:
        """Process ids of the running servers that are processes of ours."""
        return [item.pid for item in self._connections() if item.pid is not None]

    def _connections(self) -> list[Connection]:
        return [item for server in self._servers.values() for item in server.connections]
