"""A fake of a paid LLM judge: a real HTTP server that speaks OpenAI's chat completions.

It knows nothing: a script says what it answers, and how it misbehaves.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from aiohttp import web

KEY = "sk-judge-test-0123456789"

Behaviour = str
"""A reply's text, or one of the faults `FAULTS`."""
FAULTS = (
    *("hang", "drip", "huge", "not_json", "no_choice", "no_text", "too_long", "crash"),
    *("http_429", "http_429_later", "http_500", "http_503", "http_400", "http_302"),
    *("refuse_key", "no_model", "no_credit"),
)
Script = Callable[[int, str], Behaviour]
"""(number of the request, from 0; its prompt) -> what it does."""

_STATUS = {
    "http_400": (400, "the prompt is too long"),
    "http_429": (429, "slow down"),
    "http_500": (500, "oops"),
    "http_503": (503, "overloaded"),
    "http_302": (302, "elsewhere"),
    "refuse_key": (401, f"Incorrect API key provided: {KEY}"),
    "no_model": (404, "The model does not exist"),
    "no_credit": (429, "insufficient_quota"),
}


@dataclass
class FakeJudge:
    """An async context manager; `base_url` is where it listens."""

    script: Script | Sequence[Behaviour] | Behaviour = "A"
    prompts: list[str] = field(default_factory=list[str])
    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    authorizations: list[str] = field(default_factory=list[str])
    num_open: int = 0
    """Requests in progress."""
    max_open: int = 0
    base_url: str = ""

    async def __aenter__(self) -> Self:
        """Listen on a free port."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._handle)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        _, port = self._runner.addresses[0][:2]
        self.base_url = f"http://127.0.0.1:{port}/v1"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop; requests in progress are cancelled."""
        await self._runner.cleanup()

    def _behaviour(self, index: int, prompt: str) -> Behaviour:
        if isinstance(self.script, str):
            return self.script
        if callable(self.script):
            return self.script(index, prompt)
        return self.script[min(index, len(self.script) - 1)]

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        try:
            body = await request.json()
            prompt = body["messages"][0]["content"]
            self.bodies.append(body)
            self.prompts.append(prompt)
            self.authorizations.append(request.headers.get("Authorization", ""))
            return await self._answer(request, self._behaviour(len(self.prompts) - 1, prompt))
        finally:
            self.num_open -= 1

    async def _answer(self, request: web.Request, what: Behaviour) -> web.StreamResponse:
        if what in _STATUS:
            status, message = _STATUS[what]
            error = {"message": message, "code": message if what == "no_credit" else None}
            headers = {"Location": "/v1/elsewhere"} if status == 302 else {}
            return web.json_response({"error": error}, status=status, headers=headers)
        match what:
            case "http_429_later":
                return web.Response(status=429, headers={"Retry-After": "0.2"})
            case "hang":
                await asyncio.sleep(3600)
            case "drip":
                return await self._stream(request, [b" "] * 100_000, pause_s=0.01)
            case "huge":
                return await self._stream(request, [b"x" * (1 << 16)] * 160, pause_s=0.0)
            case "not_json":
                return web.Response(text="<html>502 Bad Gateway</html>")
            case "no_choice":
                return web.json_response({"choices": []})
            case "no_text":
                return web.json_response(_completion(None, "length"))
            case "crash":
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            case "too_long":
                return web.json_response(_completion("A" * 5000, "length"))
        return web.json_response(_completion(what, "stop"))

    async def _stream(
        self, request: web.Request, chunks: Sequence[bytes], pause_s: float
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(pause_s)
        await response.write_eof()
        return response


def _completion(text: str | None, reason: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return json.loads(
        json.dumps(
            {
                "id": "chatcmpl-fake",
                "object": "chat.completion",
                "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            }
        )
    )
