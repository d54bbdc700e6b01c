"""Rollout engines that take as long as decoding would: SGLang's HTTP protocol without a model.

    python -m benchmarks.decoding_engine --rates JSON --num 2   (prints their ports)

A generation is as long as its `max_new_tokens`. Up to `slots` sequences are decoded together, a
token of each in `base_s + per_sequence_s * sequences` seconds; the others wait in the order in
which they came. `POST /pause_generation` with mode `abort` ends what runs or waits with what it
has, as SGLang 0.5.20 does; requests that come during a pause wait for `/continue_generation`.
`POST /version` gives later tokens another policy version.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import deque
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import orjson
from aiohttp import web

_FILLER = 65
"""Token that everything consists of."""
_CHUNK_S = 0.004
"""Tokens of so much time are handed out together: a timer per token would be the measurement."""


@dataclass(frozen=True)
class Rates:
    """Of one engine."""

    slots: int
    base_s: float
    per_sequence_s: float

    def step_s(self, num_sequences: int) -> float:
        """Seconds of one token of each."""
        return self.base_s + self.per_sequence_s * num_sequences

    @property
    def best_token_s(self) -> float:
        """Least seconds per token, all slots taken."""
        return self.step_s(self.slots) / self.slots


@dataclass(eq=False)
class _Sequence:
    num_wanted: int
    done: asyncio.Future[str]
    versions: list[int] = field(default_factory=list[int])
    """Of each token so far."""


class DecodingEngine:
    """One engine."""

    def __init__(self, rates: Rates) -> None:
        """Idle, at version 0."""
        self._rates = rates
        self._version = 0
        self._running: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._has_work = asyncio.Event()
        self.busy_s = 0.0
        """Spent decoding."""
        self.num_tokens = 0

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/generate", self.generate)
        app.router.add_post("/abort_request", self.abort)
        app.router.add_post("/pause_generation", self.pause)
        app.router.add_post("/continue_generation", self.resume)
        app.router.add_post("/version", self.set_version)
        app.router.add_get("/load", self.load)
        return app

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """One generation."""
        body = orjson.loads(await request.read())
        await self._may_run.wait()
        wanted = body["sampling_params"]["max_new_tokens"]
        sequence = _Sequence(wanted, asyncio.get_running_loop().create_future())
        self._waiting.append(sequence)
        self._has_work.set()
        try:
            reason = await sequence.done
        finally:
            sequence.num_wanted = 0  # a client that went away takes no slot
        return web.Response(
            body=_answer(sequence.versions, reason), content_type="application/json"
        )

    async def abort(self, request: web.Request) -> web.StreamResponse:
        """End everything with what it has."""
        for sequence in (*self._running, *self._waiting):
            _end(sequence, "abort")
        self._running, self._waiting = [], deque()
        return web.json_response({})

    async def pause(self, request: web.Request) -> web.StreamResponse:
        """End everything (`abort`) or freeze it; what comes now waits."""
        self._may_run.clear()
        if orjson.loads(await request.read())["mode"] == "abort":
            return await self.abort(request)
        return web.json_response({})

    async def resume(self, request: web.Request) -> web.StreamResponse:
        """Go on."""
        self._may_run.set()
        return web.json_response({})

    async def set_version(self, request: web.Request) -> web.StreamResponse:
        """What further tokens are sampled with."""
        self._version = int(await request.text())
        return web.json_response({})

    async def load(self, request: web.Request) -> web.StreamResponse:
        """What was done since the start."""
        return web.json_response({"busy_s": self.busy_s, "num_tokens": self.num_tokens})

    async def decode(self) -> None:
        """Forever."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            await self._may_run.wait()
            self._fill()
            if not self._running:
                self._has_work.clear()
                await self._has_work.wait()
                due = loop.time()
                continue
            running = list(self._running)
            step_s = self._rates.step_s(len(running))
            least = min(max(1, s.num_wanted - len(s.versions)) for s in running)
            count = max(1, min(least, round(_CHUNK_S / step_s)))
            due = max(due, loop.time() - 0.05) + count * step_s  # late timers are made up for
            await asyncio.sleep(due - loop.time())
            self.busy_s += count * step_s
            self._running = [s for s in self._running if not self._advance(s, count)]

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._rates.slots:
            sequence = self._waiting.popleft()
            if sequence.num_wanted:
                self._running.append(sequence)

    def _advance(self, sequence: _Sequence, count: int) -> bool:
        """Give a sequence further tokens; whether it has come to its end."""
        count = min(count, sequence.num_wanted - len(sequence.versions))
        if count > 0:
            sequence.versions += [self._version] * count
            self.num_tokens += count
        if len(sequence.versions) < sequence.num_wanted:
            return False
        _end(sequence, "length")
        return True


def _end(sequence: _Sequence, reason: str) -> None:
    if not sequence.done.done():
        sequence.done.set_result(reason)


def _answer(versions: list[int], reason: str) -> bytes:
    spans: list[dict[str, Any]] = []
    start = 0
    for version, tokens in groupby(versions):
        end = start + len(list(tokens))
        spans.append({"version": str(version), "start": start, "end": end})
        start = end
    return orjson.dumps(
        {
            "text": "",
            "output_ids": [_FILLER] * len(versions),
            "meta_info": {
                "finish_reason": {"type": reason},
                "output_token_logprobs": [[-1.0, _FILLER, None]] * len(versions),
                "weight_versions": spans,
            },
        }
    )


async def _serve(rates: Rates, num: int) -> None:
    ports: list[int] = []
    runners: list[web.AppRunner] = []
    decoding: list[asyncio.Task[None]] = []
    for _ in range(num):
        engine = DecodingEngine(rates)
        runner = web.AppRunner(engine.app(), access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        ports.append(runner.addresses[0][1])
        runners.append(runner)
        decoding.append(asyncio.create_task(engine.decode()))
    print(json.dumps(ports), flush=True)
    await asyncio.gather(*decoding)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rates", type=json.loads, required=True)
    parser.add_argument("--num", type=int, required=True)
    arguments = parser.parse_args()
    asyncio.run(_serve(Rates(**arguments.rates), arguments.num))


if __name__ == "__main__":
    main()
