"""Proves what becomes of a push when an engine fails in it, and how new engines get weights.

Engines are scripted fakes and the fleet is the manager's own, without probes; the transport is
`disk`. Groups that are formed anew are in test_broadcast.py, SGLang's servers in tests/smoke.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_matpo.errors import EngineRejected, WeightSyncError
from megatron_matpo.rollout.fleet import Fleet
from megatron_matpo.rollout.health import REFITTABLE, Event, State
from megatron_matpo.weight_sync.disk import DiskTransport
from megatron_matpo.weight_sync.membership import FixedMembership, Member, Recovery, Which
from megatron_matpo.weight_sync.transaction import Transaction
from megatron_matpo.weight_sync.verify import Verifier
from tests.helpers.scripted_fake_engine import SHAPE, ScriptedFakeEngine, write_safetensors
from tests.unit.weight_sync.test_transaction import WEIGHTS


class OfFleet:
    """`Membership` that speaks with the manager's fleet directly."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.told: list[tuple] = []

    def states(self):
        return [engine["state"] for engine in self.fleet.snapshot()["engines"]]

    async def members(self, which):
        allowed = {
            Which.ALL: list(State),
            Which.LIVING: REFITTABLE,
            Which.WAITING: [State.STALE, State.REFITTING],
        }[which]
        return [
            Member(engine["index"], engine["incarnation"])
            for engine in self.fleet.snapshot()["engines"]
            if engine["state"] in allowed
        ]

    async def refit_began(self, indices):
        self.told.append(("began", list(indices)))
        self.fleet.refit_began(indices)

    async def refitted(self, version, indices):
        self.told.append(("refitted", version, list(indices)))
        self.fleet.refitted(version, indices)

    async def lost(self, reasons):
        self.told.append(("lost", sorted(reasons)))
        self.fleet.lost(reasons)
        await self.on_lost(reasons)

    async def on_lost(self, reasons):
        pass

    async def describe(self):
        return self.fleet.describe()


class Site:
    """Two engines, the fleet that knows of them, and the transaction."""

    def __init__(self, folder, *, retries=1, verify="full", num_engines=2, start_timeout_s=5.0):
        self.engines = [ScriptedFakeEngine(name) for name in "ab"[:num_engines]]
        self.fleet = Fleet.unwatched([engine.url for engine in self.engines])
        self.membership = OfFleet(self.fleet)
        self.num_exports = 0
        self.transport = DiskTransport(folder / "weights", write_safetensors)
        self.sync = Transaction(
            self._export,
            self.engines,
            self.transport,
            Verifier(verify, SHAPE, on_gpu=False),
            timeout_s=0.5,
            start_timeout_s=start_timeout_s,
            recovery=Recovery(self.membership, retries=retries, answer_timeout_s=0.3),
        )
        self.sync.connect()
        self.sync.push(1)
        self.forget()

    def _export(self):
        self.num_exports += 1
        yield from WEIGHTS.items()

    def forget(self):
        self.num_exports = 0
        self.membership.told.clear()
        for engine in self.engines:
            engine.asked.clear()

    def restart(self, index):
        """The supervisor's part, and the probe that answers."""
        engine = self.engines[index]
        engine.fails, engine.is_dead, engine.is_paused = {}, False, False
        engine.version, engine.weights = "unpushed", {}
        self.fleet._apply(index, Event.RESTARTED, "a new start")

    def serves(self, index, version):
        """It generates with that version's weights."""
        engine = self.engines[index]
        return (
            engine.version == str(version)
            and not engine.is_paused
            and engine.weights.keys() == WEIGHTS.keys()
        )


@pytest.mark.parametrize("how", ["refuses", "hangs", "dies"])
@pytest.mark.parametrize("verb", ["pause", "update", "version", "checksums"])
def test_a_push_goes_on_without_an_engine_that_fails_in_it(tmp_path, verb, how):
    site = Site(tmp_path)
    bad = site.engines[1]
    bad.fails = {verb: how} if how == "dies" else {verb: how, "flush": "hangs"}
    assert site.sync.push(2) == 2
    assert site.serves(0, 2)
    assert not site.serves(1, 2)
    assert bad.is_paused or bad.is_dead or bad.version == "1", "it serves no mixture"
    assert site.membership.states() == ["healthy", "dead"]
    assert site.membership.told == [
        ("began", [0, 1]),
        ("lost", [1]),
        ("began", [0]),
        ("refitted", 2, [0]),
    ]
    assert site.num_exports == 2
    assert site.sync.push(3) == 3, "and the next one too"
    assert site.serves(0, 3)
    site.sync.close()


def test_an_engine_that_fails_and_answers_takes_part_again(tmp_path):
    site = Site(tmp_path)
    original, calls = site.engines[1].update_weights_from_disk, []

    async def fails_once(**request):
        calls.append(1)
        if len(calls) == 1:
            raise EngineRejected("a hiccup")
        await original(**request)

    site.engines[1].update_weights_from_disk = fails_once
    assert site.sync.push(2) == 2
    assert site.serves(0, 2) and site.serves(1, 2)
    assert site.membership.states() == ["healthy", "healthy"]
    assert ("lost", []) in site.membership.told
    site.sync.close()


def test_the_manager_knows_the_version_before_any_engine_is_resumed(tmp_path):
    site = Site(tmp_path)
    order = []
    for engine in site.engines:
        engine.resume = noted(order, "resume", engine.resume)
    site.membership.refitted = noted(order, "told", site.membership.refitted)
    site.sync.push(2)
    assert order == ["told", "resume", "resume"]
    site.sync.close()


def noted(order, what, function):
    async def call(*args, **kwargs):
        order.append(what)
        return await function(*args, **kwargs)

    return call


def test_one_that_cannot_be_resumed_is_lost_and_the_others_serve(tmp_path):
    site = Site(tmp_path)
    site.engines[1].fails = {"resume": "hangs"}
    assert site.sync.push(2) == 2
    assert site.serves(0, 2)
    assert site.membership.states() == ["healthy", "dead"]
    assert site.num_exports == 1, "nothing has to be sent again"
    site.sync.close()


def test_a_new_engine_is_refitted_alone_while_the_other_serves(tmp_path):
    site = Site(tmp_path, verify="sample")
    site.restart(1)
    assert site.membership.states() == ["healthy", "stale"]
    site.sync.refit(1)
    assert site.serves(1, 1)
    assert site.engines[0].asked == [], "not even paused"
    assert site.engines[1].asked == ["flush", "pause", "update", "version", "checksums", "resume"]
    expected = site.sync._verifier._expected
    assert "model.embed_tokens.weight" in expected and len(expected) == 3, "compared whole"
    assert site.membership.states() == ["healthy", "healthy"]
    site.sync.push(2)
    assert site.serves(0, 2) and site.serves(1, 2)
    site.sync.close()


def test_a_refit_of_nobody_is_nothing(tmp_path):
    site = Site(tmp_path)
    site.sync.refit(1)
    assert site.num_exports == 0
    site.sync.close()


def test_an_engine_that_dies_again_in_its_refit_disturbs_nobody(tmp_path):
    site = Site(tmp_path)
    site.restart(1)
    site.engines[1].fails = {"update": "dies"}
    site.sync.refit(1)
    assert site.serves(0, 1)
    assert site.membership.states() == ["healthy", "dead"]
    assert site.engines[0].asked == []
    site.sync.close()


def test_the_transport_is_connected_anew_only_when_someone_else_takes_part(tmp_path):
    site = Site(tmp_path)
    connected = []
    original = site.transport.connect

    async def connect(engines):
        connected.append(engines.indices)
        await original(engines)

    site.transport.connect = connect
    site.sync.push(2)
    site.sync.push(3)
    assert connected == []
    site.restart(0)
    site.sync.push(4)
    assert connected == [[0, 1]], "another start of the same engine"
    site.restart(1)
    site.sync.refit(4)
    site.sync.push(5)
    site.sync.push(6)
    assert connected == [[0, 1], [1], [0, 1]]
    site.sync.close()


def test_without_any_engine_left_a_restarted_one_is_waited_for(tmp_path):
    site = Site(tmp_path, num_engines=1)

    async def restarted(reasons):
        site.restart(0)

    site.membership.on_lost = restarted
    site.engines[0].fails = {"update": "dies"}
    assert site.sync.push(2) == 2
    assert site.serves(0, 2)
    site.sync.close()


def test_without_any_engine_in_time_the_states_are_told(tmp_path):
    site = Site(tmp_path, num_engines=1, start_timeout_s=0.5)
    site.engines[0].fails = {"update": "dies"}
    with pytest.raises(WeightSyncError) as caught:
        site.sync.push(2)
    assert "no engine to give weights to inside run.start_timeout_s=0.5" in str(caught.value)
    assert "engine-0 (fake://a) is dead" in str(caught.value)
    site.sync.close()


def test_what_helps_neither_time_ends_in_the_error_of_the_last(tmp_path):
    site = Site(tmp_path)
    site.engines[1].fails = {"update": "corrupts"}
    with pytest.raises(WeightSyncError, match=r"phase 'verify': engine fake://b, rank 0"):
        site.sync.push(2)
    assert all(engine.is_paused for engine in site.engines)
    assert site.num_exports == 2
    with pytest.raises(WeightSyncError, match="an earlier push failed"):
        site.sync.refit(2)
    site.sync.close()


def test_without_a_manager_lost_engines_are_left_out(tmp_path):
    import asyncio

    membership = FixedMembership(3)
    asyncio.run(membership.lost({1: "gone"}))
    assert asyncio.run(membership.members(Which.LIVING)) == [Member(0, 0), Member(2, 0)]
    assert asyncio.run(membership.members(Which.WAITING)) == []


@pytest.mark.parametrize("phase", ["connect", "update", "checksums"])
def test_other_ranks_leave_a_push_that_is_tried_again(tmp_path, phase):
    """Ranks meet at every tensor of the export, as its collectives do, and before and after it."""
    everybody = threading.Barrier(2, timeout=20)
    words = queue.Queue()

    def export():
        for item in WEIGHTS.items():
            everybody.wait()
            yield item

    def agree(word):
        if word is not None:
            words.put(word)
        everybody.wait()
        word = words.get(timeout=20) if word is None else word
        everybody.wait()
        return word

    class Stubborn(DiskTransport):
        num_refused = 0 if phase == "connect" else 1

        async def connect(self, engines):
            await super().connect(engines)
            if self.num_refused == 0:
                self.num_refused += 1
                raise WeightSyncError("no group")

    def rank(engines):
        return Transaction(
            export,
            engines,
            Stubborn(tmp_path / "weights", write_safetensors),
            Verifier("full", SHAPE, on_gpu=False),
            timeout_s=5.0,
            start_timeout_s=5.0,
            recovery=Recovery(FixedMembership(2), agree, retries=1, answer_timeout_s=0.3),
        )

    engines = [ScriptedFakeEngine("a"), ScriptedFakeEngine("b")]
    if phase != "connect":
        engines[1].fails = {phase: "dies"}
    lead = rank(engines)
    with ThreadPoolExecutor() as pool:
        other = pool.submit(lambda: rank([]).push(1))
        lead.connect()
        assert lead.push(1) == 1
        assert other.result(timeout=20) == 1
    assert engines[0].version == "1" and not engines[0].is_paused
    lead.close()
