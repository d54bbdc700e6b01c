"""The manager's HTTP interface.

| request                                          | answer                                       |
|--------------------------------------------------|----------------------------------------------|
| `GET /health`                                    | whether it is ready; open to all             |
| `POST /collect`                                  | rollout bytes (long poll); or 202 and        |
|                                                  | `{"refit": [...]}`: engines wait for weights |
| `GET /in_flight?step=N`                          | what a checkpoint after step N has to hold:  |
|                                                  | rollout bytes, or 204                        |
| `POST /in_flight`                                | takes such bytes, before the first collect   |
| `GET /fleet`                                     | the state of every engine                    |
| `POST /fleet/refitting {"engines": [...]}`       | they are about to get weights                |
| `POST /fleet/refitted {"version", "engines"}`    | they hold that version, verified             |
| `POST /fleet/lost {"engines": {"0": "why"}}`     | they failed in a push                        |

Every request but `/health` needs `Authorization: Bearer TOKEN`. A collect request whose client
goes away is cancelled, and with it every episode that it started. After a 202 the episodes go on,
and the same request again is attached to them.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from aiohttp import web

from megatron_matpo import wire
from megatron_matpo.config.evaluation import TRAIN_SPLIT
from megatron_matpo.errors import MatpoError
from megatron_matpo.rollout.long_poll import Collections, EngineWaits
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


class FleetControl(EngineWaits, Protocol):
    """The engines, as the trainer hears of them and speaks of them; see `fleet.Fleet`."""

    def snapshot(self) -> dict[str, Any]:
        """All engines, as JSON holds them."""
        ...

    def refit_began(self, indices: Sequence[int]) -> None:
        """They are about to get weights."""
        ...

    def refitted(self, version: PolicyVersion, indices: Sequence[int]) -> None:
        """They hold `version`, verified."""
        ...

    def lost(self, reasons: Mapping[int, str]) -> None:
        """They failed in a push."""
        ...


class ManagerServer:
    """Answers from the moment it listens; collects once a collector is set."""

    def __init__(self, token: str) -> None:
        """`token` is what clients have to show; it is never logged."""
        self._expected = f"Bearer {token}".encode()
        self._collector: Collector | None = None
        self._fleet: FleetControl | None = None
        self._collections: Collections | None = None
        self._runner: web.AppRunner | None = None
        self.detail = "starting"
        """What `/health` says beside ready or not."""

    def set_ready(self, collector: Collector, fleet: FleetControl, detail: str) -> None:
        """Begin to accept collect requests, and what concerns the engines."""
        self._collector, self._fleet = collector, fleet
        self._collections = Collections(fleet)
        self.detail = detail

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_get("/health", self._health)
        app.router.add_post("/collect", self._collect)
        app.router.add_get("/fleet", self._tell_fleet)
        app.router.add_post("/fleet/{word:refitting|refitted|lost}", self._hear_of_fleet)
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
        if self._collections is not None:
            await self._collections.close()

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
        if refusal := self._refusal(request):
            return refusal
        assert self._collector is not None, "else refused"
        return self._collector

    async def _collect(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._refusal(request):
            return refusal
        assert self._collector is not None and self._collections is not None, "else refused"
        try:
            raw = await request.json()
            step, version, split, asks, position = _read_request(raw)
        except (ValueError, TypeError, KeyError) as error:
            return _failure(400, "ValueError", f"not a collect request: {error}")
        collect = partial(self._collector.collect, step, version, split, asks, position)
        try:
            batch = await self._collections.answer(json.dumps(raw, sort_keys=True), collect)
            if isinstance(batch, list):
                return web.json_response({"refit": batch}, status=202)
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

    async def _tell_fleet(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._refusal(request):
            return refusal
        assert self._fleet is not None, "else refused"
        return web.json_response(self._fleet.snapshot())

    async def _hear_of_fleet(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._refusal(request):
            return refusal
        assert self._fleet is not None, "else refused"
        num_engines = len(self._fleet.snapshot()["engines"])
        try:
            raw = await request.json()
            match request.match_info["word"]:
                case "refitting":
                    self._fleet.refit_began(_read_indices(raw["engines"], num_engines))
                case "refitted":
                    indices = _read_indices(raw["engines"], num_engines)
                    self._fleet.refitted(_read_version(raw["version"]), indices)
                case _:
                    reasons = {int(index): str(why) for index, why in raw["engines"].items()}
                    _read_indices(list(reasons), num_engines)
                    self._fleet.lost(reasons)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return _failure(400, "ValueError", f"not a word about engines: {error!r}")
        return web.json_response({})

    def _refusal(self, request: web.Request) -> web.Response | None:
        """Why a request is not answered: no token, or too early."""
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, self._expected):
            return _failure(401, "PermissionError", "wrong or missing bearer token")
        if self._collector is None:
            return _failure(503, "RolloutError", f"the rollout manager is not ready: {self.detail}")
        return None


def _read_indices(raw: object, num_engines: int) -> list[int]:
    if not isinstance(raw, list) or any(type(item) is not int for item in raw):
        raise ValueError(f"engines={raw!r}; expected a list of numbers")
    if wrong := [item for item in raw if not 0 <= item < num_engines]:
        raise ValueError(f"engines={raw!r}: there is no engine {wrong[0]}")
    return raw


def _read_version(raw: object) -> PolicyVersion:
    if type(raw) is not int or raw < 0:
        raise ValueError(f"version={raw!r}; expected a number that is not negative")
    return raw


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
