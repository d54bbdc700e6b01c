"""Proves routing: least loaded, sticky, another engine after a failure, versions checked."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from megatron_matpo.errors import EngineRejected, EngineUnreachable
from megatron_matpo.rollout.fleet import Fleet
from megatron_matpo.rollout.routing import Router
from megatron_matpo.types import VersionSpan
from tests.helpers.rollouts import FakeGeneration


@dataclass
class Server:
    url: str
    version: int = 3
    delay_s: float = 0.01
    failure: Exception | None = None
    finish_reason: str = "stop"
    served: list[tuple[list[int], int]] = field(default_factory=list)

    async def generate(self, input_ids: list[int], params: int) -> FakeGeneration:
        self.served.append((input_ids, params))
        await asyncio.sleep(self.delay_s)
        if self.failure is not None:
            raise self.failure
        spans = (VersionSpan(self.version, 2),)
        return FakeGeneration((1, 2), (-0.5, -0.5), self.finish_reason, spans)


def router_of(*servers: Server, max_staleness: int = 0, fleet: Fleet | None = None) -> Router:
    fleet = fleet or Fleet.unwatched([server.url for server in servers])
    return Router(servers, lambda max_tokens: max_tokens, max_staleness, fleet=fleet)


def test_new_conversations_go_to_the_least_loaded_and_stay() -> None:
    servers = [Server("a"), Server("b")]

    async def run() -> None:
        sampler = router_of(*servers).sampler(3)
        for _ in range(3):
            await asyncio.gather(*(sampler.sample([7], 16, f"c{i}") for i in range(6)))

    asyncio.run(run())
    assert [len(server.served) for server in servers] == [9, 9]
    assert servers[0].served[0] == ([7], 16)


def test_a_failure_moves_the_conversation_and_a_streak_spares_the_engine() -> None:
    servers = [Server("a", failure=EngineUnreachable("a: gone")), Server("b")]

    async def run() -> None:
        sampler = router_of(*servers).sampler(3)
        await sampler.sample([1], 9, "c")
        for index in range(5):
            await sampler.sample([1], 9, f"d{index}")
        assert [len(server.served) for server in servers] == [2, 6]

    asyncio.run(run())


def test_a_conversation_stays_where_it_moved() -> None:
    servers = [Server("a"), Server("b")]

    async def run() -> None:
        sampler = router_of(*servers).sampler(3)
        servers[0].failure = EngineUnreachable("a: gone")
        await sampler.sample([1], 9, "c")
        servers[0].failure = None
        await sampler.sample([1], 9, "c")
        assert [len(server.served) for server in servers] == [1, 2]

    asyncio.run(run())


def test_when_all_engines_fail_the_last_error_stands() -> None:
    servers = [Server(name, failure=EngineUnreachable(f"{name}: gone")) for name in "abc"]
    with pytest.raises(EngineUnreachable, match="gone"):
        asyncio.run(router_of(*servers).sampler(3).sample([1], 9, "c"))
    assert [len(server.served) for server in servers] == [1, 1, 1]


def test_tokens_of_another_version_are_an_engine_failure() -> None:
    text = (
        r"http://a: sampled with policy version 2, but the step asks for 3: .* missed a weight push"
    )
    with pytest.raises(EngineRejected, match=text):
        asyncio.run(router_of(Server("http://a", version=2)).sampler(3).sample([1], 9, "c"))
    good = Server("b")
    asyncio.run(router_of(Server("a", version=4), good).sampler(3).sample([1], 9, "c"))
    assert len(good.served) == 1


@pytest.mark.parametrize(("version", "accepted"), [(0, False), (1, True), (3, True), (4, False)])
def test_staleness_widens_what_is_accepted(version: int, accepted: bool) -> None:
    sampler = router_of(Server("a", version=version), max_staleness=2).sampler(3)
    if accepted:
        asyncio.run(sampler.sample([1], 9, "c"))
    else:
        with pytest.raises(EngineRejected, match="asks for 1 to 3"):
            asyncio.run(sampler.sample([1], 9, "c"))


def test_every_token_needs_a_logprob_and_a_version() -> None:
    class Forgetful(Server):
        async def generate(self, input_ids: list[int], params: int) -> FakeGeneration:
            return FakeGeneration((1, 2), (-0.5,), "stop", ())

    with pytest.raises(EngineRejected, match="2 tokens, but 1 log-probs and policy versions of 0"):
        asyncio.run(router_of(Forgetful("a")).sampler(3).sample([1], 9, "c"))


def test_an_aborted_generation_is_a_failure() -> None:
    sampler = router_of(Server("a", finish_reason="abort")).sampler(3)
    with pytest.raises(EngineRejected, match="ended with 'abort'"):
        asyncio.run(sampler.sample([1], 9, "c"))
