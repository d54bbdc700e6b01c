"""Proves which engines SGLang's router sends to as the fleet changes, and what a turn makes of it.

The fleet is the real one, not probed but told; the router is a fake. The real router is in
tests/smoke.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_matpo.config.rollout import HealthConfig
from megatron_matpo.errors import EngineTimeout, EngineUnreachable, RolloutError
from megatron_matpo.rollout import fleet as fleet_module
from megatron_matpo.rollout.fleet import Fleet
from megatron_matpo.rollout.routing import Router
from megatron_matpo.rollout.sglang_router import behind as behind_module
from megatron_matpo.rollout.sglang_router.behind import BehindRouter
from megatron_matpo.types import VersionSpan
from tests.helpers.rollouts import FakeGeneration

A, B = "http://a", "http://b"
GONE = EngineUnreachable("gone")


class Server:
    """An engine whose probes do as told."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.version = "unpushed"
        self.is_gone = False

    async def health_generate(self, *, deadline_s: float) -> None:
        if self.is_gone:
            raise GONE

    async def weight_version(self, *, deadline_s: float) -> str:
        return self.version


class FakeControl:
    """The router; takes a moment to use a worker, and never takes those it is told to refuse."""

    def __init__(self) -> None:
        self.used: set[str] = set()
        self.ever: list[set[str]] = []
        self.refused: set[str] = set()
        self.is_gone = False

    async def workers(self) -> dict[str, tuple[str, bool]]:
        if self.is_gone:
            raise GONE
        return {url: (url, True) for url in self.used}

    async def set_workers(self, urls: Sequence[str]) -> None:
        if self.is_gone:
            raise GONE
        self.used &= set(urls)
        await asyncio.sleep(0.01)
        self.used |= set(urls) - self.refused
        self.ever.append(set(self.used))
        if self.used != set(urls):
            raise EngineTimeout("does not send to all")


class Site:
    """Two engines behind a router that is one engine to ours."""

    url = "http://router"

    def __init__(self, limit_s: float) -> None:
        self.servers = [Server(A), Server(B)]
        health = HealthConfig(probe_every_s=0.01, probe_timeout_s=5.0)
        self.fleet = Fleet(self.servers, health, has_trainer=True)
        self.control = FakeControl()
        self.behind = BehindRouter(
            self.fleet, [A, B], self.control, limit_s=limit_s, log=Path("router.log")
        )
        self.num_asked = 0

    async def generate(self, input_ids: Sequence[int], params: int) -> FakeGeneration:
        self.num_asked += 1
        if any(s.is_gone and s.url in self.control.used for s in self.servers):
            raise GONE
        return FakeGeneration((1, 2), (-0.5, -0.5), "stop", (VersionSpan(1, 2),))

    def router(self) -> Router[int]:
        return Router([self], lambda max_tokens: max_tokens, fleet=self.behind)

    def push(self, version: int, *indices: int) -> None:
        self.fleet.refit_began(indices)
        for index in indices:
            self.servers[index].version = str(version)
        self.fleet.refitted(version, indices)

    async def until(self, *urls: str) -> None:
        """Return when the router sends to these, and has done so for a while."""
        async with asyncio.timeout(10):
            while self.control.used != set(urls):
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        assert self.control.used == set(urls)


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind_module, "CHECK_EVERY_S", 0.02)
    monkeypatch.setattr(fleet_module, "RETRY_S", 0.01)


def play(body: Callable[[Site], Awaitable[None]], limit_s: float = 60.0) -> None:
    """`body` while the router's workers are kept; a failure of that is a failure of `body`."""

    async def run() -> None:
        site = Site(limit_s)
        probing = asyncio.ensure_future(site.fleet.run())
        keeping = asyncio.ensure_future(site.behind.run())
        playing = asyncio.ensure_future(body(site))
        try:
            async with asyncio.timeout(20):
                await asyncio.wait((keeping, playing), return_when=asyncio.FIRST_COMPLETED)
            (playing if playing.done() else keeping).result()
        finally:
            for task in (probing, keeping, playing):
                task.cancel()
                with suppress(asyncio.CancelledError, RolloutError):
                    await task

    asyncio.run(run())


def test_engines_are_workers_once_healthy_and_stay_it_while_they_get_weights() -> None:
    async def body(site: Site) -> None:
        waiting = asyncio.create_task(site.behind.wait_routable())
        site.fleet.refit_began([0, 1])
        await site.until()
        assert not waiting.done()
        site.push(1, 0, 1)
        assert await waiting == [0]
        await site.until(A, B)
        changes = site.behind.incarnation(0)
        site.fleet.refit_began([0, 1])
        await site.until(A, B)
        waiting = asyncio.create_task(site.behind.wait_routable())
        await asyncio.sleep(0.05)
        assert not waiting.done(), "no engine is routable"
        site.push(2, 0, 1)
        assert await waiting == [0]
        assert site.behind.present == 2
        assert site.behind.incarnation(0) == changes, "an ordinary push changes no worker"

    play(body)


def test_a_dead_engine_is_taken_out_and_comes_back_when_it_has_the_weights() -> None:
    async def body(site: Site) -> None:
        site.push(1, 0, 1)
        await site.until(A, B)
        changes = site.behind.incarnation(0)
        site.servers[1].is_gone = True
        await site.until(A)
        assert site.behind.incarnation(0) == changes + 1
        site.servers[1].is_gone, site.servers[1].version = False, "unpushed"
        assert await site.fleet.refit_wanted() == [1]
        await site.until(A)
        site.fleet.refit_began([1])
        await site.until(A)
        site.push(1, 1)
        await site.until(A, B)

    play(body)


def test_an_engine_started_anew_between_two_looks_is_no_worker_while_it_is_refitted() -> None:
    async def body(site: Site) -> None:
        site.push(1, 0, 1)
        await site.until(A, B)
        refitting = asyncio.create_task(site.fleet.refit_wanted())
        site.servers[1].version = "unpushed"
        assert await refitting == [1]
        site.fleet.refit_began([1])  # the same turn of the loop: stale was never looked at
        await site.until(A)

    play(body)


def test_without_any_engine_the_router_has_no_worker() -> None:
    async def body(site: Site) -> None:
        site.push(1, 0, 1)
        await site.until(A, B)
        for server in site.servers:
            server.is_gone = True
        await site.until()
        waiting = asyncio.create_task(site.behind.wait_routable())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        for server in site.servers:
            server.is_gone, server.version = False, "unpushed"
        await site.fleet.refit_wanted()
        site.push(1, 0, 1)
        assert await waiting == [0]

    play(body)


def test_a_turn_is_tried_again_when_the_workers_changed_and_else_fails() -> None:
    async def body(site: Site) -> None:
        site.push(1, 0, 1)
        await site.until(A, B)
        site.servers[1].is_gone = True
        turn = await site.router().sampler(1).sample([5], 8, "one")
        assert tuple(turn.token_ids) == (1, 2)
        assert site.num_asked == 2, "again as soon as the dead one was out, and not before"

        async def refuse(input_ids: Sequence[int], params: int) -> FakeGeneration:
            raise EngineUnreachable("no")

        site.generate = refuse
        with pytest.raises(EngineUnreachable, match="no"):
            await site.router().sampler(1).sample([5], 8, "two")

    play(body)


def test_an_engine_that_the_router_does_not_take_leaves_the_others() -> None:
    async def body(site: Site) -> None:
        site.control.refused = {B}
        site.push(1, 0, 1)
        assert await site.behind.wait_routable() == [0]
        await site.until(A)
        site.control.refused = set()
        await site.until(A, B)

    play(body)


def test_a_router_that_never_takes_an_engine_ends_the_manager() -> None:
    async def body(site: Site) -> None:
        site.control.refused = {B}
        site.push(1, 0, 1)
        await asyncio.sleep(60)

    with pytest.raises(RolloutError, match=r"does not take its engines since 0.1 s .*router\.log"):
        play(body, limit_s=0.1)


def test_a_router_that_ended_ends_the_manager() -> None:
    async def body(site: Site) -> None:
        site.push(1, 0, 1)
        await site.until(A, B)
        site.control.is_gone = True
        await asyncio.sleep(60)

    with pytest.raises(RolloutError, match=r"rollout\.router=sglang: .*gone; see router\.log"):
        play(body)
