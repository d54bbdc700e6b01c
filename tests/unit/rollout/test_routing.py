"""Proves routing: least loaded, sticky, another engine after a failure, versions checked."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_matpo.errors import EngineRejected, EngineUnreachable
from megatron_matpo.rollout.fleet import Fleet
from megatron_matpo.rollout.generation import BrokenGeneration, Generation
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


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_matpo.rollout.routing._RESEND_S", 0.0)


def router_of(*servers: Server, fleet: Fleet | None = None) -> Router:
    fleet = fleet or Fleet.unwatched([server.url for server in servers])
    return Router(servers, lambda max_tokens: max_tokens, (99,), fleet=fleet)


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


@pytest.mark.parametrize(("version", "accepted"), [(0, True), (3, True), (4, False)])
def test_a_follower_takes_every_version_that_was_pushed(version: int, accepted: bool) -> None:
    fleet = Fleet.unwatched(["a"])
    fleet.refit_began([0])
    fleet.refitted(3, [0])
    router = router_of(Server("a", version=version), fleet=fleet)
    if accepted:
        asyncio.run(router.follower().sample([1], 9, "c"))
    else:
        with pytest.raises(EngineRejected, match="asks for 0 to 3"):
            asyncio.run(router.follower().sample([1], 9, "c"))


def test_every_token_needs_a_logprob_and_a_version() -> None:
    class Forgetful(Server):
        async def generate(self, input_ids: list[int], params: int) -> FakeGeneration:
            return FakeGeneration((1, 2), (-0.5,), "stop", ())

    with pytest.raises(EngineRejected, match="2 tokens, but 1 log-probs and policy versions of 0"):
        asyncio.run(router_of(Forgetful("a")).sampler(3).sample([1], 9, "c"))


class Script:
    """An engine that answers with `pieces`, one per request: tokens, how they end, version."""

    def __init__(self, url: str, *pieces: tuple[tuple[int, ...], str, int]) -> None:
        self.url, self._pieces = url, list(pieces)
        self.asked: list[tuple[list[int], int]] = []

    async def generate(self, input_ids: Sequence[int], params: int) -> Generation:
        self.asked.append((list(input_ids), params))
        tokens, finish, version = self._pieces.pop(0)
        logprobs = array("f", [-float(token) for token in tokens])
        spans = (VersionSpan(version, len(tokens)),) if tokens else ()
        broke = finish == "broke"
        piece = Generation(array("i", tokens), logprobs, "abort" if broke else finish, spans)
        if broke and tokens:
            raise BrokenGeneration(EngineUnreachable(f"{self.url}: gone"), piece)
        if broke:
            raise EngineUnreachable(f"{self.url}: gone")
        return piece


def sampled_by(sampler: Any) -> Generation:
    return asyncio.run(sampler.sample([7], 9, "c"))


def test_a_turn_that_was_paused_goes_on_from_its_tokens_on_its_engine() -> None:
    engine = Script(
        "a", ((1, 2), "abort", 3), ((), "abort", 3), ((4,), "abort", 3), ((5,), "stop", 4)
    )
    idle = Script("b")
    router = router_of(engine, idle)
    router.sampler(4)
    turn = sampled_by(router.follower())
    assert list(turn.token_ids) == [1, 2, 4, 5] and turn.finish_reason == "stop"
    assert list(turn.logprobs) == [-1.0, -2.0, -4.0, -5.0]
    assert turn.versions == (VersionSpan(3, 3), VersionSpan(4, 1))
    asked = [([7], 9), ([7, 1, 2], 7), ([7, 1, 2], 7), ([7, 1, 2, 4], 6)]
    assert engine.asked == asked and not idle.asked
    assert router.num_continued == 1


def test_a_turn_goes_on_elsewhere_when_its_engine_dies() -> None:
    dying, other = Script("a", ((1, 2), "broke", 3)), Script("b", ((5,), "stop", 3))
    turn = sampled_by(router_of(dying, other).sampler(3))
    assert list(turn.token_ids) == [1, 2, 5]
    assert other.asked == [([7, 1, 2], 7)]


@pytest.mark.parametrize(
    ("pieces", "finish", "num_tokens"),
    [
        ([((1, 99), "abort", 3)], "stop", 2),  # told to end before it looked at the last token
        ([((1,) * 9, "abort", 3)], "length", 9),
        ([((1,) * 4, "abort", 3), ((1,) * 5, "length", 3)], "length", 9),
        ([((1, 99), "broke", 3)], "stop", 2),
    ],
)
def test_a_turn_that_is_complete_is_not_continued(
    pieces: list[tuple[tuple[int, ...], str, int]], finish: str, num_tokens: int
) -> None:
    turn = sampled_by(router_of(Script("a", *pieces)).sampler(3))
    assert (turn.finish_reason, len(turn.token_ids)) == (finish, num_tokens)


def test_an_engine_that_only_ends_requests_is_broken() -> None:
    engines = [Script(name, *[((), "abort", 3)] * 9) for name in "ab"]
    with pytest.raises(EngineRejected, match=r"engine . ended 9 requests at once"):
        sampled_by(router_of(*engines).sampler(3))


def test_parts_of_another_version_are_not_kept() -> None:
    dying, other = Script("a", ((1, 2), "broke", 2)), Script("b", ((5,), "stop", 3))
    turn = sampled_by(router_of(dying, other).sampler(3))
    assert list(turn.token_ids) == [5]
