"""A real MCP server over streamable HTTP, the SDK's own: `http_server.py PORT sse|json`.

If `EXPECTED` is set in its environment, requests without that value in `X-Api-Key` get status 401.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import anyio
import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from starlette.types import ASGIApp, Receive, Scope, Send

server = MCPServer("http")


@server.tool()
async def echo(text: str) -> str:
    return text


@server.tool()
async def sleep(seconds: float) -> str:
    await anyio.sleep(seconds)
    return f"slept {seconds:g}"


@server.tool()
async def die() -> str:
    os._exit(7)


@server.tool()
async def die_once(marker: str) -> str:
    if not os.path.exists(marker):
        open(marker, "w").close()
        os._exit(7)
    return "survived"


@server.tool()
async def big(chars: int) -> str:
    return "x" * chars


@server.tool()
async def fail() -> str:
    raise ToolError("no such page")


@server.tool()
async def pid() -> str:
    return str(os.getpid())


@server.tool()
async def key(context: Context[Any, Any]) -> str:
    headers = context.headers or {}
    return f"your key is {headers.get('x-api-key')}"


def guarded(app: ASGIApp, expected: str) -> ASGIApp:
    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and dict(scope["headers"]).get(b"x-api-key") != expected.encode()
        ):
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"who are you"})
            return
        await app(scope, receive, send)

    return run


def main() -> None:
    app: ASGIApp = server.streamable_http_app(json_response=sys.argv[2] == "json")
    if expected := os.environ.get("EXPECTED"):
        app = guarded(app, expected)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")


if __name__ == "__main__":
    main()
