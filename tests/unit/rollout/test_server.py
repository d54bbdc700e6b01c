"""Proves the HTTP interface: who may ask, what comes back, and that a lost client cancels.

The manager behind it plays a script; its start as a process is in `test_manager_process.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from megatron_matpo import wire
from megatron_matpo.config.rollout import HealthConfig
from megatron_matpo.errors import RolloutError
from megatron_matpo.ports import free_ports
from megatron_matpo.rollout.collect import RolloutManager
from megatron_matpo.rollout.fleet import Fleet
from megatron_matpo.rollout.health import Event
from megatron_matpo.rollout.server import ManagerServer
from megatron_matpo.types import RolloutBatch
from tests.helpers.moving_policy import MovingPolicy, single_agent
from tests.helpers.moving_policy import manager_of as manager_for
from tests.helpers.rollouts import FakeEngine, FakeToolBox, make_chat, make_config, make_question

TOKEN = "s3cret"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
ASK = {"step": 1, "policy_version": 0, "split": "train"}


def manager_of(engine: FakeEngine, tools: FakeToolBox | None = None) -> RolloutManager:
    questions = {"train": [make_question()], "eval": [make_question()]}
    return RolloutManager(
        make_config(), lambda version: engine, tools or FakeToolBox(), make_chat(), questions
    )


def serve(
    collector: Any,
    client: Callable[[aiohttp.ClientSession, ManagerServer], Awaitable[None]],
    fleet: Fleet | None = None,
) -> None:
    async def run() -> None:
        server, port = ManagerServer(TOKEN), free_ports("127.0.0.1", 1)[0]
        await server.start("127.0.0.1", port)
        if collector is not None:
            server.set_ready(collector, fleet or Fleet.unwatched(["http://a"]), "1 question")
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                await client(session, server)
        finally:
            await server.close()

    asyncio.run(run())


def test_health_is_open_and_tells_when_it_is_ready() -> None:
    async def client(session: aiohttp.ClientSession, server: ManagerServer) -> None:
        async with session.get("/health") as reply:
            assert await reply.json() == {"ready": False, "detail": "starting"}
        async with session.post("/collect", json=ASK, headers=HEADERS) as reply:
            assert reply.status == 503
        manager = manager_of(FakeEngine(lambda *_: "x"))
        server.set_ready(manager, Fleet.unwatched(["http://a"]), "1 question")
        async with session.get("/health") as reply:
            assert await reply.json() == {"ready": True, "detail": "1 question"}

    serve(None, client)


def test_a_step_comes_back_as_bytes() -> None:
    async def client(session: aiohttp.ClientSession, server: ManagerServer) -> None:
        async with session.post("/collect", json=ASK, headers=HEADERS) as reply:
            assert reply.status == 200
            batch = wire.decode(await reply.read())
        assert batch.step == 1 and len(batch.groups) == 2
        assert batch.groups[0].episodes[0].answer == "Ada"

    serve(manager_of(FakeEngine(lambda *_: "\\boxed{Ada}")), client)


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer x"}, {"Authorization": TOKEN}])
def test_collect_needs_the_token(headers: dict[str, str]) -> None:
    engine = FakeEngine(lambda *_: "x")

    async def client(session: aiohttp.ClientSession, server: ManagerServer) -> None:
        async with session.post("/collect", json=ASK, headers=headers) as reply:
            assert reply.status == 401 and TOKEN not in await reply.text()

    serve(manager_of(engine), client)
    assert engine.contexts == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"nonsense", "not a collect request"),
        (b"[]", "expected a JSON object"),
        (b'{"step": 1}', "policy_version"),
        (b'{"step": "1", "policy_version": 0}', "must be integers"),
        (b'{"step": 1, "policy_version": 0, "position": "3"}', "must be integers"),
        (b'{"step": 1, "policy_version": 0, "position": -1}', "position not negative"),
        (b'{"step": 1, "policy_version": 0, "split": 3}', "expected a text"),
        (b'{"step": 1, "policy_version": 0, "rows": [[1, 0]]}', "pairs of a row"),
    ],
)
def test_wrong_requests_are_named(body: bytes, words: str) -> None:
    async def client(session: aiohttp.ClientSession, server: ManagerServer) -> None:
        async with session.post("/collect", data=body, headers=HEADERS) as reply:
            assert reply.status == 400
            assert words in (await reply.json())["error"]

    serve(manager_of(FakeEngine(lambda *_: "x")), client)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (RolloutError("2 of 4 failed"), "RolloutError", "2 of 4 failed"),
        (KeyError("oops"), "KeyError", "internal error: KeyError('oops')"),
    ],
)
def test_failures_are_json(error: Exception, kind: str, text: str) -> None:
    class Collector:
        async def collect(self, *request: Any) -> None:
            raise error

    async def client(session: aiohttp.ClientSession, server: ManagerServer) -> None:
        async with session.post("/collect", json=ASK, headers=HEADERS) as reply:
            assert reply.status == 500
            assert await reply.json() == {"error": text, "type": kind}

    serve(Collector(), client)


@pytest.mark.parametrize("way", ["client leaves", "server closes"])
def test_what_nobody_waits_for_is_cancelled(way: str) -> None:
    state = {"begun": asyncio.Event(), "cancelled": asyncio.Event()}

    class Collector:
        async def collect(self, *request: Any) -> None:
            state["begun"].set()
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                state["cancelled"].set()
                raise

    async def client(session: aiohttp.ClientSession, server: ManagerServer) -> None:
        request = asyncio.ensure_future(session.post("/collect", json=ASK, headers=HEADERS))
        await asyncio.wait_for(state["begun"].wait(), 5)
        if way == "client leaves":
            request.cancel()
        else:
            await asyncio.wait_for(server.close(), 5)
        await asyncio.wait_for(state["cancelled"].wait(), 5)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)

    serve(Collector(), client)


class Slow:
    """Collects when it is told to, and counts how often it was begun and cancelled."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.began = asyncio.Event()
        self.num_begun = self.num_cancelled = 0

    async def collect(
        self, step: int, version: int, split: str, asks: object, position: int
    ) -> RolloutBatch:
        self.num_begun += 1
        self.began.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return RolloutBatch(step, version, (), {}, position)


def test_an_engine_that_waits_for_weights_interrupts_the_answer_but_not_the_collection() -> None:
    slow, fleet = Slow(), Fleet.unwatched(["http://a", "http://b"])

    async def client(session: aiohttp.ClientSession, server: ManagerServer) -> None:
        first = asyncio.create_task(post(session, "/collect", ASK))
        await slow.began.wait()
        fleet._apply(1, Event.RESTARTED, "a new start")
        assert await first == (202, b'{"refit": [1]}')
        assert await post(session, "/collect", ASK) == (202, b'{"refit": [1]}'), "still waiting"
        assert (await post(session, "/fleet/refitting", {"engines": [1]}))[0] == 200
        again = asyncio.create_task(post(session, "/collect", ASK))
        refitted = {"version": 0, "engines": [1]}
        assert (await post(session, "/fleet/refitted", refitted))[0] == 200
        slow.gate.set()
        status, body = await again
        assert status == 200
        assert wire.decode(body, "").step == 1
        assert (slow.num_begun, slow.num_cancelled) == (1, 0)
        assert (await post(session, "/collect", ASK))[0] == 200
        assert slow.num_begun == 2, "a finished one is not handed out twice"

    serve(slow, client, fleet)


def test_an_interrupted_collection_that_nobody_asks_for_again_is_cancelled_by_the_next() -> None:
    slow, fleet = Slow(), Fleet.unwatched(["http://a", "http://b"])

    async def client(session: aiohttp.ClientSession, server: ManagerServer) -> None:
        fleet._apply(1, Event.RESTARTED, "a new start")
        assert (await post(session, "/collect", ASK))[0] == 202
        fleet.refit_began([1])
        slow.began.clear()
        second = asyncio.create_task(post(session, "/collect", {**ASK, "step": 2}))
        await slow.began.wait()
        assert (slow.num_begun, slow.num_cancelled) == (2, 1)
        slow.gate.set()
        assert (await second)[0] == 200

    serve(slow, client, fleet)


def test_a_client_that_goes_away_after_it_was_attached_cancels_too() -> None:
    slow, fleet = Slow(), Fleet.unwatched(["http://a", "http://b"])

    async def client(session: aiohttp.ClientSession, server: ManagerServer) -> None:
        fleet._apply(1, Event.RESTARTED, "a new start")
        assert (await post(session, "/collect", ASK))[0] == 202
        fleet.refit_began([1])
        attached = asyncio.create_task(post(session, "/collect", ASK))
        await asyncio.sleep(0.2)
        attached.cancel()
        async with asyncio.timeout(5):
            while not slow.num_cancelled:
                await asyncio.sleep(0.01)
        assert slow.num_begun == 1

    serve(slow, client, fleet)


def test_a_step_without_engines_fails_with_their_states() -> None:
    slow = Slow()
    fleet = Fleet.unwatched(["http://a"], HealthConfig(no_engine_timeout_s=0.2))
    fleet.lost({0: "it melted"})

    async def client(session: aiohttp.ClientSession, server: ManagerServer) -> None:
        status, body = await post(session, "/collect", ASK)
        assert status == 500
        assert "engine-0 (http://a) is dead: it melted" in body.decode()
        assert slow.num_cancelled == 1

    serve(slow, client, fleet)


def test_the_fleet_is_told_and_heard_of() -> None:
    fleet = Fleet.unwatched(["http://a", "http://b"])

    async def client(session: aiohttp.ClientSession, server: ManagerServer) -> None:
        assert (await post(session, "/fleet/refitting", {"engines": [0, 1]}))[0] == 200
        assert (await post(session, "/fleet/refitted", {"version": 5, "engines": [0]}))[0] == 200
        assert (await post(session, "/fleet/lost", {"engines": {"1": "bucket 3"}}))[0] == 200
        async with session.get("/fleet", headers=HEADERS) as reply:
            told = await reply.json()
        assert told["version"] == 5
        assert [(e["index"], e["state"], e["version"]) for e in told["engines"]] == [
            (0, "healthy", 5),
            (1, "dead", None),
        ]
        assert told["engines"][1]["reason"] == "bucket 3"
        for path, bad in (
            ("refitting", {"engines": [2]}),
            ("refitting", {"engines": "all"}),
            ("refitted", {"engines": [0]}),
            ("refitted", {"version": -1, "engines": [0]}),
            ("lost", {"engines": {"one": "why"}}),
            ("lost", []),
        ):
            assert (await post(session, f"/fleet/{path}", bad))[0] == 400, (path, bad)
        async with session.get("/fleet") as reply:
            assert reply.status == 401
        async with session.post("/fleet/lost", json={"engines": {"0": "x"}}) as reply:
            assert reply.status == 401
        assert fleet.routable() == [0]

    serve(Slow(), client, fleet)


async def post(session: aiohttp.ClientSession, path: str, body: object) -> tuple[int, bytes]:
    async with session.post(path, json=body, headers=HEADERS) as reply:
        return reply.status, await reply.read()


def test_groups_in_flight_go_out_and_come_back() -> None:
    policy = MovingPolicy(lambda conversation: 0.01)
    config = single_agent(max_staleness=1)
    saved: list[bytes] = []
    uids: list[str] = []

    async def first(session: aiohttp.ClientSession, server: ManagerServer) -> None:
        async with session.get("/in_flight?step=0", headers=HEADERS) as reply:
            assert reply.status == 204, "nothing is begun"
        async with session.post("/collect", json=ASK, headers=HEADERS) as reply:
            assert reply.status == 200
        for path in ("/in_flight", "/in_flight?step=x", "/in_flight?step=-1"):
            async with session.get(path, headers=HEADERS) as reply:
                assert reply.status == 400
        for ask in (session.get("/in_flight?step=1"), session.post("/in_flight", data=b"")):
            async with ask as reply:
                assert reply.status == 401
        async with session.get("/in_flight?step=1", headers=HEADERS) as reply:
            saved.append(await reply.read())
        uids.extend(group.uid for group in wire.decode(saved[0]).groups)
        assert len(uids) == 3

    async def second(session: aiohttp.ClientSession, server: ManagerServer) -> None:
        async with session.post("/in_flight", data=b"no such", headers=HEADERS) as reply:
            assert reply.status == 500 and "not a recorded rollout" in (await reply.json())["error"]
        async with session.post("/in_flight", data=saved[0], headers=HEADERS) as reply:
            assert reply.status == 204
        async with session.post("/collect", json=ASK | {"step": 2}, headers=HEADERS) as reply:
            batch = wire.decode(await reply.read())
        assert {group.uid for group in batch.groups} == set(uids)
        assert batch.next_position == 9, "6 were begun, and 3 more"

    serve(manager_for(config, policy), first)
    serve(manager_for(config, policy), second)
