"""Transport `broadcast` after an engine was lost: a new group with those that are left.

Engines are processes that join real gloo groups, one after another, at the same address. What is
decided about engines is in test_recovery.py; SGLang's servers are in tests/smoke.
"""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
import torch

from megatron_matpo.ports import free_ports
from megatron_matpo.weight_sync.broadcast import BroadcastTransport
from megatron_matpo.weight_sync.membership import FixedMembership, Member, Recovery, Which
from megatron_matpo.weight_sync.transaction import Transaction
from megatron_matpo.weight_sync.verify import Verifier
from tests.helpers.gloo_engine import GlooEngine, engine_side
from tests.helpers.scripted_fake_engine import SHAPE

WEIGHTS = {name: torch.rand(1000) for name in "abcd"}


class DyingEngine(GlooEngine):
    """In a process of its own, which can end in the middle of a bucket."""

    def __init__(self, name):
        pipe, child = multiprocessing.Pipe()
        super().__init__(pipe, f"fake://{name}")
        self.joined = []
        self.dies_at = ""
        """In the bucket that holds this tensor it is killed, or frozen."""
        self.death = signal.SIGKILL
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=engine_side, args=(child,), daemon=True)
        self.process.start()
        pipe.send((0, "flush", {}))
        assert pipe.poll(100) and pipe.recv()[1] == "done", "it has imported what it needs"

    def is_alive(self):
        return self.process.is_alive()

    async def init_weights_update_group(self, **join):
        self.joined.append(join["group_name"])
        await super().init_weights_update_group(**join)

    async def update_weights_from_distributed(self, **request):
        if self.dies_at in request["names"]:
            os.kill(self.process.pid, self.death)
        await super().update_weights_from_distributed(**request)

    def end(self):
        self.process.kill()
        self.process.join(10)

    def holds(self, version):
        return (
            self.version == str(version)
            and not self.is_paused
            and all(torch.equal(self.weights[name], tensor) for name, tensor in WEIGHTS.items())
        )


class Members(FixedMembership):
    """With an engine that comes back as another start."""

    back: tuple[Member, ...] = ()

    async def members(self, which):
        if which is Which.WAITING:
            return list(self.back)
        return sorted([*await super().members(which), *self.back])


@pytest.fixture
def engines():
    made = [DyingEngine(name) for name in "ab"]
    yield made
    for engine in made:
        engine.end()


def sync_with(engines, membership, timeout_s=30.0):
    (port,) = free_ports("127.0.0.1", 1)
    return Transaction(
        lambda: iter(WEIGHTS.items()),
        engines,
        BroadcastTransport(
            bucket_bytes=4096, ranks_per_engine=1, host="127.0.0.1", port=port, backend="gloo"
        ),
        Verifier("version", SHAPE, on_gpu=False),
        timeout_s=timeout_s,
        start_timeout_s=60.0,
        recovery=Recovery(membership, retries=1, answer_timeout_s=5.0),
    )


@pytest.mark.timeout(240)
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP])
def test_the_push_reaches_the_others_in_a_new_group_and_later_the_new_start(engines, death):
    membership = Members(2)
    # A frozen engine costs the whole deadline of a bucket.
    sync = sync_with(engines, membership, timeout_s=30.0 if death == signal.SIGKILL else 8.0)
    sync.connect()
    assert sync.push(1) == 1
    assert all(engine.holds(1) for engine in engines)
    assert engines[0].joined == engines[1].joined and len(engines[0].joined) == 1
    engines[1].dies_at, engines[1].death = "c", death
    assert sync.push(2) == 2
    assert engines[0].holds(2)
    assert not engines[1].holds(2)
    assert len(set(engines[0].joined)) == 2
    engines[1].end()
    engines[1].__init__("b")
    membership.back = (Member(1, 1),)
    sync.refit(2)
    assert engines[1].holds(2)
    assert len(engines[0].joined) == 2, "it went on serving"
    membership.back = (Member(1, 1),)
    assert sync.push(3) == 3
    assert all(engine.holds(3) for engine in engines)
    assert engines[0].joined[-1] == engines[1].joined[-1]
    sync.close()
