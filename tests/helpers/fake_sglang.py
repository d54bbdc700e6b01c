"""A server that speaks SGLang's HTTP (0.5.20) and misbehaves as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from megatron_matpo.rollout.engine_client import EngineClient


def generation(**meta: Any) -> dict[str, Any]:
    """An answer as SGLang 0.5.20 gives it."""
    return {
        "output_ids": [7, 8, 2],
        "meta_info": {
            "finish_reason": {"type": "stop", "matched": 2},
            "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None], [-0.25, 2, None]],
            "weight_version": "4",
            "weight_versions": [
                {"version": "3", "start": 0, "end": 1},
                {"version": "4", "start": 1, "end": 3},
            ],
            **meta,
        },
    }


class FakeSglang:
    """Answers every path with `answer`, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answer: Callable[[web.Request], Awaitable[web.StreamResponse]] = self.generates
        self.asked: list[tuple[str, str, Any, str | None]] = []
        self.aborted = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        key = request.headers.get("Authorization")
        self.asked.append((request.method, request.path, body, key))
        return await self.answer(request)

    async def generates(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(generation())

    async def hangs(self, request: web.Request) -> web.StreamResponse:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.aborted.set()
            raise
        return web.Response()

    async def fails(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=500, text="scheduler died " + "x" * 10_000)

    async def drips(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.02)

    async def floods(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b" " * 2**16)
        except (ConnectionError, asyncio.CancelledError):
            self.aborted.set()
            raise

    async def breaks_off(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"output_ids":')
        assert request.transport is not None
        request.transport.abort()
        return response


@asynccontextmanager
async def fake_server(limit_s: float = 5.0) -> AsyncIterator[tuple[FakeSglang, EngineClient]]:
    fake = FakeSglang()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    client = EngineClient(f"http://{host}:{port}", "the-key", request_timeout_s=limit_s)
    try:
        yield fake, client
    finally:
        await client.close()
        await runner.cleanup()
