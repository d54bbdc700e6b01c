"""A tool server on the network: one MCP session over streamable HTTP, on the SDK's transport.

The SDK's transport ends the whole session when one request breaks, and lets a reply that drips or
never ends go on after its caller has gone. `_Client` below it therefore gives every request a
deadline and a size, and turns what breaks into an answer to that request alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
from mcp.client._transport import ReadStream, WriteStream
from mcp.client.streamable_http import LAST_EVENT_ID, MCP_SESSION_ID, streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp.shared.message import SessionMessage
from mcp_types import CONNECTION_CLOSED

from megatron_matpo.config.tools import McpServerConfig
from megatron_matpo.errors import ToolError

MAX_BODY_BYTES = 64 * 2**20
"""A longer reply is taken for garbage: the request fails."""
CONNECT_TIMEOUT_S = 10.0
GOODBYE_TIMEOUT_S = 2.0
"""For ending the session; the server may be gone."""
_TRANSIENT = frozenset({401, 403, 408, 425, 429, 500, 502, 503, 504})
"""Statuses that are about the service, not the call. 401 and 403: no call can do better."""
_SHOWN_BODY_CHARS = 300

# What these say reaches us as errors anyway; their own lines quote addresses and replies.
_TALKATIVE = ("httpx2", "httpcore2", "mcp.client.streamable_http")


@dataclass(frozen=True, slots=True)
class Remote:
    """Everything that is needed to open one session with a server."""

    server: str
    index: int
    """Which of the server's `num_processes` sessions."""
    url: str
    call_timeout_s: float
    headers: dict[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """For messages: `tool server 'search' (https://host/mcp)`."""
        return f"tool server {self.server!r} ({self.url})"

    def redact(self, text: str) -> str:
        """`text` without the values of `headers_from` variables."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def plan_remote(server: str, index: int, config: McpServerConfig) -> Remote:
    """Session `index` of `server`.

    Raises:
        ToolError: a variable of `headers_from` is not set (it is named), or cannot be a header.
    """
    path = f"tools.servers.{server}.headers_from"
    headers: dict[str, str] = {}
    for header, variable in config.headers_from.items():
        value = os.environ.get(variable, "").strip()
        if not value:
            raise ToolError(
                f"{path}.{header} names {variable}, which is not set in the environment of this "
                f"run: export {variable}=... before starting it"
            )
        if not (value.isascii() and value.isprintable()):
            raise ToolError(f"{path}.{header}: the value of {variable} is no header value")
        headers[header] = value
    # `Bearer KEY` is one header, and KEY alone a secret too.
    parts = {part for value in headers.values() for part in (value, *value.split())}
    return Remote(
        server=server,
        index=index,
        url=config.url,
        call_timeout_s=config.call_timeout_s,
        headers=headers,
        secrets=tuple(sorted((part for part in parts if len(part) >= 4), key=len, reverse=True)),
    )


class HttpLink:
    """An open session's transport. `ended` is set when the server is gone or forgot the session."""

    pid = None

    def __init__(self, remote: Remote) -> None:
        """Use `open`."""
        self.ended = asyncio.Event()
        self.fault = ""
        """Why we gave up on it; empty if it was stopped."""
        self.read_stream: ReadStream[SessionMessage | Exception]
        self.write_stream: WriteStream[SessionMessage]
        self._remote = remote
        self._mark = secrets.token_hex(8)
        self._opened = asyncio.Event()
        self._stopping = asyncio.Event()
        # A task of its own, because the SDK's task group must be left by the task that entered it.
        self._task = asyncio.create_task(self._run(), name=f"session {remote.name}")

    @classmethod
    async def open(cls, remote: Remote) -> HttpLink:
        """Make the streams; nothing is sent before the session says something.

        Raises:
            ToolError: the address cannot be used at all.
        """
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        link = cls(remote)
        opened = asyncio.create_task(link._opened.wait())
        try:
            await asyncio.wait([link._task, opened], return_when=asyncio.FIRST_COMPLETED)
        finally:
            opened.cancel()
        if not link._opened.is_set():
            raise ToolError(f"{remote.name} {link.end_text()}")
        return link

    def give_up(self, fault: str) -> None:
        """Take the session for lost: calls in flight end as if the connection had broken."""
        if not self.ended.is_set():
            self.fault = fault
            self.ended.set()

    def end_text(self) -> str:
        """Why the session is no longer usable."""
        return self._remote.redact(self.fault or "was closed")

    def lost_text(self, error: MCPError) -> str:
        """What happened if `error` is the transport's and not the server's; empty otherwise."""
        if error.data == self._mark:
            return error.message
        # The SDK's own: a stream of events ended early, or the whole session did.
        if error.code == CONNECTION_CLOSED and (
            self.ended.is_set() or error.message.startswith("SSE stream")
        ):
            return error.message
        return ""

    async def stop(self) -> None:
        """End the session at the server if it still listens, and close every connection."""
        self._stopping.set()
        try:
            await asyncio.wait([self._task], timeout=2 * GOODBYE_TIMEOUT_S)
        finally:
            self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        client = _Client(self._remote, self._mark, self.give_up)
        try:
            async with (
                client,
                streamable_http_client(
                    self._remote.url, http_client=client, max_sse_event_size=MAX_BODY_BYTES
                ) as (self.read_stream, self.write_stream),
            ):
                self._opened.set()
                await self._stopping.wait()
                client.is_closing = True
        except Exception as error:  # the SDK's task group wraps whatever broke in it
            self.fault = self.fault or f"broke: {error!r}"
        finally:
            self.ended.set()


class _Client(httpx2.AsyncClient):
    """Bounds every request in time and size; what fails becomes a JSON-RPC error with `mark`."""

    def __init__(self, remote: Remote, mark: str, give_up: Callable[[str], None]) -> None:
        super().__init__(
            headers=remote.headers,
            timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
        )
        self.is_closing = False
        self._remote = remote
        self._mark = mark
        self._give_up = give_up

    async def send(self, request: httpx2.Request, **kwargs: Any) -> httpx2.Response:
        if request.method == "GET" and LAST_EVENT_ID not in request.headers:
            # The server's own messages: open as long as the session.
            return await super().send(request, **kwargs)
        limit_s = GOODBYE_TIMEOUT_S if self.is_closing else self._remote.call_timeout_s
        deadline = asyncio.get_running_loop().time() + limit_s
        try:
            async with asyncio.timeout_at(deadline):
                response = await super().send(request, **kwargs)
                kind = response.headers.get("content-type", "").lower()
                if response.status_code < 300 and kind.startswith("text/event-stream"):
                    assert isinstance(response.stream, httpx2.AsyncByteStream)
                    response.stream = _BoundedStream(response.stream, deadline)
                    return response
                if response.has_redirect_location:
                    return response
                body = await _read(response)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            fault = f"cannot be reached: {error or type(error).__name__}"
            self._give_up(fault)
            return self._failure(request, fault)
        except (httpx2.RequestError, TimeoutError, _TooLongError) as error:
            return self._failure(request, f"broke off its reply: {error or type(error).__name__}")
        return self._judge(request, response, body)

    def _judge(
        self, request: httpx2.Request, response: httpx2.Response, body: bytes
    ) -> httpx2.Response:
        """The response whole, or an error in its place if it is not an answer to the call."""
        status = response.status_code
        has_session = MCP_SESSION_ID in request.headers
        text = body[: 4 * _SHOWN_BODY_CHARS].decode("utf-8", "replace")[:_SHOWN_BODY_CHARS]
        if has_session and (status == 404 or (status == 400 and re.search("(?i)session", text))):
            fault = f"forgot the session: HTTP {status}: {text}"
            self._give_up(fault)
            return self._failure(request, fault)
        if status in _TRANSIENT and not _is_rpc_error(body):
            return self._failure(request, f"answered with HTTP {status}: {text}")
        kept = {
            name: value
            for name, value in response.headers.items()
            if name.lower() not in ("content-encoding", "content-length", "transfer-encoding")
        }
        return httpx2.Response(status, headers=kept, content=body, request=request)

    def _failure(self, request: httpx2.Request, text: str) -> httpx2.Response:
        # Of notifications the SDK ignores it; for requests it puts in the right id.
        error = {"code": CONNECTION_CLOSED, "message": text, "data": self._mark}
        content = {"jsonrpc": "2.0", "id": 0, "error": error}
        return httpx2.Response(502, json=content, request=request)


class _TooLongError(Exception):
    """More than `MAX_BODY_BYTES`."""

    def __init__(self) -> None:
        super().__init__(f"more than {MAX_BODY_BYTES >> 20} MiB")


async def _read(response: httpx2.Response) -> bytes:
    """The decoded body; the connection is given back whatever happens."""
    parts: list[bytes] = []
    size = 0
    try:
        async for part in response.aiter_bytes():
            parts.append(part)
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise _TooLongError
    finally:
        await response.aclose()
    return b"".join(parts)


def _is_rpc_error(body: bytes) -> bool:
    try:
        message = json.loads(body)
    except ValueError:
        return False
    return isinstance(message, dict) and "jsonrpc" in message and "error" in message


class _BoundedStream(httpx2.AsyncByteStream):
    """A stream of events that ends with an error at its deadline; the SDK bounds each event."""

    def __init__(self, inner: httpx2.AsyncByteStream, deadline: float) -> None:
        self._inner = inner
        self._deadline = deadline

    async def __aiter__(self) -> AsyncIterator[bytes]:
        parts = self._inner.__aiter__()
        while True:
            async with asyncio.timeout_at(self._deadline):
                try:
                    part = await anext(parts)
                except StopAsyncIteration:
                    return
            yield part

    async def aclose(self) -> None:
        await self._inner.aclose()
