"""One MCP session with a server, kept alive by a task of its own.

Below it lies a `Link`: a process of ours (`process.ServerProcess`) or an address on the network
(`remote.HttpLink`). Either is opened again, with growing pauses, whenever it goes away.

The SDK's session is made of cancel scopes that must be entered and left by the same task, so the
session lives in `Connection._run` from start to end; callers from other tasks only send requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from mcp import ClientSession, Implementation
from mcp.client._transport import ReadStream, WriteStream
from mcp.shared.exceptions import MCPError
from mcp.shared.message import SessionMessage
from mcp_types import CONNECTION_CLOSED, CallToolResult, PaginatedRequestParams, Tool

from megatron_matpo.errors import ToolError
from megatron_matpo.mcp_tools.process import clean_arguments

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 30.0
MAX_QUICK_RESTARTS = 5
"""After so many deaths in a row calls fail at once instead of waiting for the next restart."""
PING_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)
_CLIENT = Implementation(name="megatron_matpo", version="1")


class ConnectionLostError(Exception):
    """The transport broke before the answer came; says how, if that is known already."""


class Target(Protocol):
    """Where a server is: a command (`launch.Launch`) or an address (`remote.Remote`)."""

    @property
    def server(self) -> str:
        """The server's name in the recipe."""
        ...

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def redact(self, text: str) -> str:
        """`text` without the target's secrets."""
        ...


class Link(Protocol):
    """An open transport. Errors of the transport never leave it as exceptions of its own."""

    ended: asyncio.Event
    """Set when no further message can come."""

    @property
    def read_stream(self) -> ReadStream[SessionMessage | Exception]:
        """Messages of the server."""
        ...

    @property
    def write_stream(self) -> WriteStream[SessionMessage]:
        """Messages to the server."""
        ...

    @property
    def pid(self) -> int | None:
        """Process id, None if it is no process of ours."""
        ...

    def give_up(self, fault: str) -> None:
        """Take it for lost: calls in flight end as if the connection had broken."""
        ...

    def end_text(self) -> str:
        """Why it is no longer usable."""
        ...

    def lost_text(self, error: MCPError) -> str:
        """What happened if `error` is the transport's own; empty if the server said it."""
        ...

    async def stop(self) -> None:
        """Close it; nothing of it is left afterwards."""
        ...


class Connection:
    """Opens a link, opens it again when it ends, and sends calls over it."""

    def __init__(
        self,
        target: Target,
        open_link: Callable[[], Awaitable[Link]],
        start_timeout_s: float,
        on_change: Callable[[], None],
    ) -> None:
        """`on_change` is called whenever the connection became usable or unusable."""
        self.target = target
        self.tools: list[Tool] = []
        self.in_flight = 0
        self.num_restarts = 0
        self.last_error = ""
        self._start_timeout_s = start_timeout_s
        self._on_change = on_change
        self._session: ClientSession | None = None
        self._open_link = open_link
        self._link: Link | None = None
        self._deaths_in_a_row = 0
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ping: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Calls can be sent now."""
        return (
            self._session is not None and self._link is not None and not self._link.ended.is_set()
        )

    @property
    def is_hopeless(self) -> bool:
        """It dies again and again; waiting for it is not worth a caller's time."""
        return not self.is_ready and self._deaths_in_a_row > MAX_QUICK_RESTARTS

    @property
    def is_closed(self) -> bool:
        """`close` was called, or `start` failed: it will not come back."""
        return self._closing.is_set() or self._task is None or self._task.done()

    @property
    def pid(self) -> int | None:
        """Process id, None while there is no process of ours."""
        return self._link.pid if self._link else None

    async def start(self) -> None:
        """Open the link and shake hands; afterwards it is opened again whenever it ends.

        Raises:
            ToolError: it does not start inside `start_timeout_s`, exits, or does not speak MCP.
        """
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(started), name=self.target.name)
        # The task itself is waited for as well: whatever ends it must not leave `started` open.
        await asyncio.wait([self._task, started], return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            raise ToolError(f"{self.target.name} did not start: {self._task.exception()!r}")
        await started

    async def call(self, tool: str, arguments: dict[str, Any]) -> CallToolResult:
        """One call, without a deadline.

        Raises:
            ConnectionLostError: no answer can come any more.
            MCPError: the server answered with a JSON-RPC error.
        """
        session, link = self._session, self._link
        if session is None or link is None:
            raise ConnectionLostError
        self.in_flight += 1
        try:
            result = await session.call_tool(tool, clean_arguments(arguments))
        except MCPError as error:
            if lost := link.lost_text(error):
                raise ConnectionLostError(lost) from error
            self._deaths_in_a_row = 0
            raise
        finally:
            self.in_flight -= 1
        self._deaths_in_a_row = 0
        return result

    def suspect(self) -> None:
        """A call ran past its deadline: if the server does not answer a ping, restart it."""
        if self._ping is None or self._ping.done():
            self._ping = asyncio.create_task(self._check(), name=f"ping {self.target.name}")

    async def close(self) -> None:
        """Stop the process or end the session; returns when it is gone."""
        self._closing.set()
        self._on_change()
        if self._ping is not None:
            self._ping.cancel()
        if self._task is not None:
            if self._session is None:
                self._task.cancel()  # it does not look at `_closing` while it shakes hands
            await asyncio.wait([self._task])

    async def _check(self) -> None:
        session, link = self._session, self._link
        if session is None or link is None:
            return
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await session.send_ping()
        except TimeoutError:
            link.give_up(f"was ended: it did not answer a ping in {PING_TIMEOUT_S:g} s")
        except MCPError:
            return  # it speaks, even if it does not know `ping`

    async def _run(self, started: asyncio.Future[None]) -> None:
        while not self._closing.is_set():
            error = await self._serve(started)
            self._on_change()
            if self._closing.is_set():
                break
            self.last_error = error
            if not started.done():
                started.set_exception(ToolError(error))
                return
            self._deaths_in_a_row += 1
            # The exponent is bounded because a float's is: 3.0 ** 700 raises.
            exponent = min(self._deaths_in_a_row - 1, 10)
            delay = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 3.0**exponent)
            _log.warning("%s; restarting it in %.1f s", error, delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), delay)
            self.num_restarts += not self._closing.is_set()
        if not started.done():
            started.set_exception(ToolError(f"{self.target.name} was closed while it started"))

    async def _serve(self, started: asyncio.Future[None]) -> str:
        """One life of the link; returns why it ended."""
        # Shielded: a cancelled spawn would leave a process that nobody knows.
        opening = asyncio.ensure_future(self._open_link())
        try:
            link = await asyncio.shield(opening)
        except ToolError as error:
            return str(error)
        except asyncio.CancelledError:
            with contextlib.suppress(ToolError):
                await (await opening).stop()
            raise
        self._link = link
        failure = ""
        try:
            # Errors leave the body as values: the session's task group would wrap them in groups.
            async with ClientSession(
                link.read_stream, link.write_stream, client_info=_CLIENT
            ) as session:
                failure = await self._shake_hands(session, link)
                if not failure:
                    self._session = session
                    if not started.done():
                        started.set_result(None)
                    self._on_change()
                    await self._until_closing_or(link.ended)
        finally:
            self._session = None
            await link.stop()
            self._link = None
        return self.target.redact(f"{self.target.name} {failure}{link.end_text()}")

    async def _until_closing_or(self, ended: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (self._closing, ended)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _shake_hands(self, session: ClientSession, link: Link) -> str:
        """Initialise and list the tools; returns what went wrong, or an empty string."""
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await session.initialize()
                self.tools = await _list_tools(session)
        except TimeoutError:
            return (
                f"did not start within tools.servers.{self.target.server}.start_timeout_s = "
                f"{self._start_timeout_s:g} s; it was ended and "
            )
        except MCPError as error:
            if lost := link.lost_text(error):
                link.give_up(lost)
            if error.code == CONNECTION_CLOSED:
                return "did not start: it "
            return f"did not start: it answered the handshake with {error.message!r} and "
        except (RuntimeError, ValueError) as error:
            return f"did not start: it does not speak MCP ({str(error)[:300]}) and "
        return ""


async def _list_tools(session: ClientSession) -> list[Tool]:
    tools: list[Tool] = []
    cursor: str | None = None
    while True:
        params = PaginatedRequestParams(cursor=cursor) if cursor else None
        page = await session.list_tools(params=params)
        tools.extend(page.tools)
        cursor = page.next_cursor
        if not cursor:
            return tools
