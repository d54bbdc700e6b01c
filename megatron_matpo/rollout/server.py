"""The manager's HTTP interface.

    GET  /health             ready or not, and why
    POST /collect            long poll: rollout bytes back
    GET  /in_flight?step=N   what a checkpoint after step N has to hold: rollout bytes, or 204
    POST /in_flight          such bytes back, before the first collect

Every request but `/health` needs `Authorization: Bearer TOKEN`. A collect request whose client
goes away is cancelled, and with it every episode that it started.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from aiohttp import web

from megatron_matpo import wire
from megatron_matpo.config.evaluation import TRAIN_SPLIT
from megatron_matpo.errors import MatpoError
from megatron_matpo.types import PolicyVersion, RolloutBatch, RowAsk

_log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 1 << 36
"""Groups in flight are a few hundred MB of tokens; only who has the token is read at all."""
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Collector(Protocol):
    """What the server serves."""

    async def collect(
        self,
        step: int,
        version: PolicyVersion,
        split: str,
        asks: Sequence[RowAsk] | None,
        position: int,
    ) -> RolloutBatch:
        """As `RolloutManager.collect`."""
        ...

    def in_flight(self, trained_step: int) -> RolloutBatch | None:
        """As `RolloutManager.in_flight`."""
        ...

    def restore(self, saved: RolloutBatch) -> None:
        """As `RolloutManager.restore`."""
        ...


class ManagerServer:
    """Answers from the moment it listens; collects once a collector is set."""

    def __init__(self, token: str) -> None:
        """`token` is what clients have to show; it is never logged."""
        self._expected = f"Bearer {token}".encode()
        self._collector: Collector | None = None
        self._runner: web.AppRunner | None = None
        self.detail = "starting"
        """What `/health` says beside ready or not."""

    def set_ready(self, collector: Collector, detail: str) -> None:
        """Begin to accept collect requests."""
        self._collector = collector
        self.detail = detail

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_get("/health", self._health)
        app.router.add_post("/collect", self._collect)
        app.router.add_get("/in_flight", self._in_flight)
        app.router.add_post("/in_flight", self._restore)
        return app

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            OSError: the address is taken.
        """
        # handler_cancellation: a client that disconnects cancels its handler.
        self._runner = web.AppRunner(
            self.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()

    async def close(self) -> None:
        """Stop listening; requests in progress are cancelled."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"ready": self._collector is not None, "detail": self.detail})

    async def _in_flight(self, request: web.Request) -> web.StreamResponse:
        collector = self._collector_for(request)
        if isinstance(collector, web.Response):
            return collector
        step = request.query.get("step", "")
        if not step.isdecimal():
            return _failure(400, "ValueError", f"step={step!r}: expected a number")
        saved = collector.in_flight(int(step))
        if saved is None:
            return web.Response(status=204)
        body = await asyncio.to_thread(wire.encode, saved)
        return web.Response(body=body, content_type="application/octet-stream")

    async def _restore(self, request: web.Request) -> web.StreamResponse:
        collector = self._collector_for(request)
        if isinstance(collector, web.Response):
            return collector
        try:
            body = await request.read()
            collector.restore(await asyncio.to_thread(wire.decode, body, "groups in flight"))
        except MatpoError as error:
            _log.error("groups in flight: %s", error)
            return _failure(500, type(error).__name__, str(error))
        return web.Response(status=204)

    def _collector_for(self, request: web.Request) -> Collector | web.Response:
        """Who answers, or the answer to who may not ask or asks too early."""
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, self._expected):
            return _failure(401, "PermissionError", "wrong or missing bearer token")
        if self._collector is None:
            return _failure(503, "RolloutError", f"the rollout manager is not ready: {self.detail}")
        return self._collector

    async def _collect(self, request: web.Request) -> web.StreamResponse:
        collector = self._collector_for(request)
        if isinstance(collector, web.Response):
            return collector
        try:
            step, version, split, asks, position = _read_request(await request.json())
        except (ValueError, TypeError, KeyError) as error:
            return _failure(400, "ValueError", f"not a collect request: {error}")
        try:
            batch = await collector.collect(step, version, split, asks, position)
            # Large batches take seconds to encode; other requests are answered meanwhile.
            body = await asyncio.to_thread(wire.encode, batch)
            return web.Response(body=body, content_type="application/octet-stream")
        except MatpoError as error:
            _log.error("step %d (%s): %s", step, split, error)
            return _failure(500, type(error).__name__, str(error))
        except Exception as error:
            # A bug of ours: the trainer gets its name, the log the place.
            _log.error("step %d (%s) failed:\n%s", step, split, traceback.format_exc())
            return _failure(500, type(error).__name__, f"internal error: {error!r}")


def _read_request(raw: object) -> tuple[int, PolicyVersion, str, list[RowAsk] | None, int]:
    if not isinstance(raw, dict):
        raise ValueError("expected a JSON object")
    split, rows = raw.get("split", TRAIN_SPLIT), raw.get("rows")
    if not isinstance(split, str):
        raise ValueError(f"split={split!r}; expected a text")
    step, version, position = raw["step"], raw["policy_version"], raw.get("position", 0)
    if any(type(value) is not int for value in (step, version, position)) or position < 0:
        raise ValueError(
            "step, policy_version and position must be integers, position not negative"
        )
    asks = None if rows is None else [_read_ask(item) for item in rows]
    return step, version, split, asks, position


def _read_ask(raw: object) -> RowAsk:
    match raw:
        case [int(row), int(num_samples)] if row >= 0 and num_samples >= 1:
            return RowAsk(row, num_samples)
    raise ValueError(f"rows: expected pairs of a row and a number of samples, got {raw!r}")


def _failure(status: int, kind: str, message: str) -> web.Response:
    text = json.dumps({"error": message, "type": kind})
    return web.Response(status=status, text=text, content_type="application/json")
