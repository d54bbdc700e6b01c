"""Proves what the fleet makes of probes, requests and words of the trainer, with scripted engines.

All sequences of events are walked in test_health.py; real engines are in tests/smoke.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from megatron_matpo.config.rollout import HealthConfig
from megatron_matpo.errors import (
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnreachable,
)
from megatron_matpo.rollout import fleet as fleet_module
from megatron_matpo.rollout.fleet import Fleet
from megatron_matpo.rollout.generation import BrokenGeneration, Generation
from megatron_matpo.rollout.routing import Router
from megatron_matpo.types import VersionSpan
from tests.helpers.rollouts import FakeGeneration

QUICK = HealthConfig(probe_every_s=0.01, probe_timeout_s=5.0, no_engine_timeout_s=0.2)
GONE = EngineUnreachable("gone")


class Server:
    """An engine whose probes and requests do as told."""

    def __init__(self, name: str) -> None:
        self.url = f"http://{name}"
        self.version = "unpushed"
        self.trouble: EngineError | None = None
        self.num_probes = 0
        self.served: list[list[int]] = []
        self.holds_requests = False
        self.closed = asyncio.Event()

    async def health_generate(self, *, deadline_s: float) -> None:
        self.num_probes += 1
        if self.trouble is not None:
            raise self.trouble

    async def weight_version(self, *, deadline_s: float) -> str:
        return self.version

    async def close(self) -> None:
        self.closed.set()

    async def generate(self, input_ids: list[int], params: int) -> FakeGeneration:
        self.served.append(input_ids)
        if self.holds_requests:
            await self.closed.wait()
            version = (VersionSpan(int(self.version), 1),)
            begun = Generation(array("i", [7]), array("f", [-1.0]), "abort", version)
            raise BrokenGeneration(GONE, begun)
        if self.trouble is not None:
            raise self.trouble
        return FakeGeneration((1, 2), (-0.5, -0.5), "stop", (VersionSpan(int(self.version), 2),))


class Site:
    """Two servers, their fleet, and what it asked to restart."""

    def __init__(self, config: HealthConfig, *, has_trainer: bool) -> None:
        self.servers = [Server("a"), Server("b")]
        self.restarts: list[tuple[int, str]] = []
        self.fleet = Fleet(
            self.servers,
            config,
            has_trainer=has_trainer,
            ask_restart=lambda index, why: self.restarts.append((index, why)),
        )

    def push(self, version: int, *indices: int) -> None:
        """What a whole push of the trainer tells."""
        self.fleet.refit_began(indices)
        for index in indices:
            self.servers[index].version = str(version)
        self.fleet.refitted(version, indices)

    def states(self) -> list[str]:
        return [engine["state"] for engine in self.fleet.snapshot()["engines"]]

    async def until(self, *states: str) -> None:
        async with asyncio.timeout(10):
            while self.states() != list(states):
                await asyncio.sleep(0.005)

    async def not_probed(self) -> None:
        """Probes that ran are over, and there are no others."""
        before = [server.num_probes for server in self.servers]
        await asyncio.sleep(0.1)
        after = [server.num_probes for server in self.servers]
        assert all(late - early <= 1 for early, late in zip(before, after, strict=True))

    async def probed(self) -> None:
        """Return when every engine was probed three more times."""
        wanted = [server.num_probes + 3 for server in self.servers]
        async with asyncio.timeout(10):
            while any(s.num_probes < n for s, n in zip(self.servers, wanted, strict=True)):
                await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "RETRY_S", 0.01)


def play(
    body: Callable[[Site], Awaitable[None]],
    config: HealthConfig = QUICK,
    *,
    has_trainer: bool = True,
) -> None:
    async def run() -> None:
        site = Site(config, has_trainer=has_trainer)
        probing = asyncio.create_task(site.fleet.run())
        try:
            await body(site)
        finally:
            probing.cancel()
            with suppress(asyncio.CancelledError):
                await probing

    asyncio.run(run())


def test_engines_are_routable_after_a_push_that_was_verified_and_not_before() -> None:
    async def body(site: Site) -> None:
        await site.until("stale", "stale")
        assert site.fleet.routable() == []
        site.fleet.refit_began([0, 1])
        await site.not_probed()
        assert site.states() == ["refitting", "refitting"]
        site.push(4, 0, 1)
        assert site.fleet.routable() == [0, 1]
        assert site.fleet.present == 4
        await site.probed()
        assert site.states() == ["healthy", "healthy"]

    play(body)


def test_an_engine_dies_after_three_probes_and_comes_back_as_one_to_refit() -> None:
    async def body(site: Site) -> None:
        site.push(1, 0, 1)
        site.servers[1].trouble = GONE
        await site.until("healthy", "dead")
        assert site.restarts == [(1, "gone")]
        assert site.fleet.routable() == [0]
        assert site.fleet.incarnation(1) == 0
        wanted = asyncio.create_task(site.fleet.refit_wanted())
        await site.probed()
        assert not wanted.done()
        site.servers[1].trouble = EngineRejected("HTTP 503")
        await site.until("healthy", "starting")
        site.servers[1].trouble, site.servers[1].version = None, "unpushed"
        assert await wanted == [1]
        assert site.states() == ["healthy", "stale"]
        assert site.fleet.routable() == [0]
        site.push(1, 1)
        assert site.states() == ["healthy", "healthy"], "the others hold that version already"
        assert len(site.restarts) == 1

    play(body)


def test_a_restart_that_no_probe_missed_is_seen_by_the_version() -> None:
    async def body(site: Site) -> None:
        site.push(7, 0, 1)
        site.servers[0].version = "unpushed"
        await site.until("stale", "healthy")
        assert site.fleet.incarnation(0) == 1
        assert site.restarts == []

    play(body)


def test_one_unanswered_probe_is_forgiven() -> None:
    async def body(site: Site) -> None:
        site.push(1, 0, 1)
        for _ in range(5):
            site.servers[0].trouble = EngineTimeout("slow")
            asked = site.servers[0].num_probes
            while site.servers[0].num_probes == asked:
                await asyncio.sleep(0)
            site.servers[0].trouble = None
            await site.probed()
        assert site.states() == ["healthy", "healthy"]

    play(body)


def test_engines_that_were_left_out_of_a_push_are_not_asked_any_more() -> None:
    async def body(site: Site) -> None:
        site.push(1, 0, 1)
        site.fleet.lost({1: "bucket 3: no answer"})
        site.push(2, 0)
        assert site.restarts == [(1, "bucket 3: no answer")]
        assert site.fleet.routable() == [0]
        await site.until("healthy", "stale")
        (wanted,) = await site.fleet.refit_wanted()
        assert wanted == 1

    play(body)


def test_a_probe_that_began_before_the_push_says_nothing() -> None:
    async def body(site: Site) -> None:
        site.push(1, 0, 1)
        gate, server = asyncio.Event(), site.servers[0]
        reached = asyncio.Event()

        async def slow_version(*, deadline_s: float) -> str:
            held = server.version
            reached.set()
            await gate.wait()
            return held

        server.weight_version = slow_version  # type: ignore[method-assign]
        await reached.wait()
        site.push(2, 0, 1)
        gate.set()
        await site.probed()
        assert site.states() == ["healthy", "healthy"]
        assert site.fleet.incarnation(0) == 0

    play(body)


def test_without_a_trainer_an_engine_is_healthy_once_it_answers() -> None:
    async def body(site: Site) -> None:
        for server in site.servers:
            server.version = "0"
        site.servers[1].trouble = EngineRejected("HTTP 503")
        await site.until("healthy", "starting")
        site.servers[1].trouble = None
        await site.until("healthy", "healthy")
        site.servers[1].trouble = GONE
        await site.until("healthy", "dead")
        site.servers[1].trouble = None
        await site.until("healthy", "healthy")

    play(body, has_trainer=False)


def test_without_engines_for_too_long_the_states_are_told() -> None:
    async def body(site: Site) -> None:
        site.push(1, 0, 1)
        hopeless = asyncio.create_task(site.fleet.hopeless())
        site.servers[0].trouble = site.servers[1].trouble = GONE
        await site.until("dead", "dead")
        site.servers[0].trouble = None
        await site.until("stale", "dead")
        text = str(await hopeless)
        assert "no engine serves the present weights since 0.2 s" in text
        assert "rollout.health.no_engine_timeout_s" in text
        assert "engine-0 (http://a) is stale: " in text
        assert "engine-1 (http://b) is dead: gone" in text

    play(body)


def test_an_engine_in_time_is_hope() -> None:
    async def body(site: Site) -> None:
        hopeless = asyncio.create_task(site.fleet.hopeless())
        await asyncio.sleep(0)
        site.push(1, 0)
        await asyncio.sleep(0.5)
        assert not hopeless.done()
        hopeless.cancel()

    play(body)


def router_of(site: Site) -> Router[int]:
    return Router(site.servers, lambda max_tokens: max_tokens, fleet=site.fleet)  # type: ignore


def test_a_conversation_waits_for_an_engine_and_is_served_after_its_restart() -> None:
    async def body(site: Site) -> None:
        site.push(1, 0)
        await site.until("healthy", "stale")
        sampler = router_of(site).sampler(1)
        site.servers[0].trouble = site.servers[1].trouble = GONE
        talk = asyncio.create_task(sampler.sample([5], 9, "c"))
        await site.until("dead", "dead")
        assert not talk.done(), "its only engine died: that is no answer"
        site.servers[0].trouble, site.servers[0].version = None, "unpushed"
        await site.until("stale", "dead")
        assert not talk.done()
        site.push(1, 0)
        assert list((await talk).token_ids) == [1, 2]
        assert site.servers[1].served == []

    play(body, HealthConfig(probe_every_s=0.01))


def test_a_request_that_live_engines_refuse_fails_with_the_last_error() -> None:
    async def body(site: Site) -> None:
        site.push(1, 0, 1)

        async def refuse(input_ids: list[int], params: int) -> FakeGeneration:
            raise EngineRejected("too long")

        for server in site.servers:
            server.generate = refuse  # type: ignore[method-assign]
        with pytest.raises(EngineRejected, match="too long"):
            await router_of(site).sampler(1).sample([5], 9, "c")

    play(body)


def test_a_request_to_a_frozen_engine_goes_elsewhere_once_it_is_found_dead() -> None:
    async def body(site: Site) -> None:
        site.push(1, 0, 1)
        frozen, other = site.servers
        frozen.holds_requests = True
        frozen.trouble = EngineTimeout("frozen")
        sampler = router_of(site).sampler(1)
        answers = await asyncio.wait_for(
            asyncio.gather(*(sampler.sample([i], 9, f"c{i}") for i in range(4))), 10
        )
        # Two had a token of the frozen one, which is kept.
        assert (
            sorted(list(answer.token_ids) for answer in answers) == [[1, 2]] * 2 + [[7, 1, 2]] * 2
        )
        assert sorted(len(ids) for ids in other.served) == [1, 1, 2, 2]
        assert site.states() == ["dead", "healthy"]

    play(body)
