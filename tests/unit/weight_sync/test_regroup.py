"""Transport `broadcast` after an engine was lost: a new group with those that are left.

Engines are processes that join real gloo groups, one after another, at the same address. What is
decided about engines is in test_recovery.py; SGLang's servers are in tests/smoke.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from datetime import timedelta

import pytest
import torch

from megatron_matpo.errors import EngineRejected, EngineUnreachable
from megatron_matpo.launch.ports import free_ports
from megatron_matpo.weight_sync.broadcast import BroadcastTransport
from megatron_matpo.weight_sync.membership import FixedMembership, Member, Recovery, Which
from megatron_matpo.weight_sync.transaction import Transaction
from megatron_matpo.weight_sync.verify import Verifier
from tests.helpers.scripted_fake_engine import SHAPE

WEIGHTS = {name: torch.rand(1000) for name in "abcd"}


def _engine(pipe):
    """Joins whatever it is told to, and receives; a broken collective is an answer, not its end."""
    from torch import distributed as dist
    from torch.distributed import distributed_c10d as c10d

    pipe.send("imported")
    group = None
    while True:
        number, told = pipe.recv()
        if told == "flush":
            pipe.send((number, "done"))
        elif "port" in told:
            where = f"tcp://127.0.0.1:{told['port']}"
            store, rank, size = next(c10d.rendezvous(where, told["rank"], told["size"]))
            group, _ = c10d._new_process_group_helper(
                size,
                rank,
                [],
                c10d.Backend("gloo"),
                c10d.PrefixStore(told["name"], store),
                group_name=told["name"],
                timeout=timedelta(seconds=60),
            )
            c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
            pipe.send((number, "done"))
        else:
            data = torch.empty(told["num_bytes"], dtype=torch.uint8)
            try:
                dist.broadcast(data, src=0, group=group)
            except RuntimeError as error:
                pipe.send((number, f"failed: {error}"))
            else:
                pipe.send((number, data.numpy().tobytes()))  # a tensor needs its sender


class JoiningEngine:
    """Speaks `EngineControl`, one verb at a time as SGLang's scheduler does."""

    def __init__(self, name):
        self.url = f"fake://{name}"
        self.version, self.weights, self.is_paused = "unpushed", {}, False
        self.groups, self.num_asked = [], 0
        self.dies_at = ""
        """In the bucket that holds this tensor it is killed, or frozen."""
        self.death = signal.SIGKILL
        self.scheduler = asyncio.Lock()
        self.pipe, child = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_engine, args=(child,), daemon=True)
        self.process.start()
        assert self.pipe.poll(100) and self.pipe.recv() == "imported"

    async def ask(self, told):
        async with self.scheduler:
            self.num_asked += 1
            number, answer = 0, None
            try:
                self.pipe.send((self.num_asked, told))
                while number != self.num_asked:  # else of a request that nobody waits for
                    if self.pipe.poll():
                        number, answer = self.pipe.recv()
                    elif not self.process.is_alive():
                        raise EngineUnreachable("connection lost")
                    else:
                        await asyncio.sleep(0.01)
            except (OSError, EOFError) as error:
                raise EngineUnreachable("connection lost") from error
        if isinstance(answer, str) and answer.startswith("failed"):
            raise EngineRejected(answer)
        return answer

    async def wait_ready(self, *, deadline_s):
        pass

    async def pause(self, *, mode, deadline_s):
        self.is_paused = True

    async def resume(self, *, deadline_s):
        self.is_paused = False

    async def flush_cache(self, *, deadline_s):
        await self.ask("flush")

    async def init_weights_update_group(self, **join):
        name = join["group_name"]
        self.groups.append(name)
        place = {"port": join["master_port"], "rank": join["rank_offset"]}
        await self.ask({**place, "size": join["world_size"], "name": name})

    async def update_weights_from_distributed(self, **request):
        if self.dies_at in request["names"]:
            os.kill(self.process.pid, self.death)
        sizes = [shape[0] for shape in request["shapes"]]
        if request["load_format"] == "flattened_bucket":
            data = await self.ask({"num_bytes": 4 * sum(sizes)})
        else:
            data = b"".join([await self.ask({"num_bytes": 4 * size}) for size in sizes])
        parts = torch.frombuffer(bytearray(data), dtype=torch.float32).split(sizes)
        self.weights |= dict(zip(request["names"], parts, strict=True))
        self.version = request["weight_version"] or self.version

    async def weight_version(self, *, deadline_s):
        return self.version

    async def close(self):
        pass

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
    made = [JoiningEngine(name) for name in "ab"]
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
    assert engines[0].groups == engines[1].groups and len(engines[0].groups) == 1
    engines[1].dies_at, engines[1].death = "c", death
    assert sync.push(2) == 2
    assert engines[0].holds(2)
    assert not engines[1].holds(2)
    assert len(set(engines[0].groups)) == 2
    engines[1].end()
    engines[1].__init__("b")
    membership.back = (Member(1, 1),)
    sync.refit(2)
    assert engines[1].holds(2)
    assert len(engines[0].groups) == 2, "it went on serving"
    membership.back = (Member(1, 1),)
    assert sync.push(3) == 3
    assert all(engine.holds(3) for engine in engines)
    assert engines[0].groups[-1] == engines[1].groups[-1]
    sync.close()
