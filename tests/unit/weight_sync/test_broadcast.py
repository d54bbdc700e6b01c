"""Transport `broadcast` to fake engines in processes of their own, over a real gloo group.

Proves: bytes arrive under their names, in several buckets too, and every way in which an engine can
fail while it joins or receives ends in a named error inside the deadline. The phases around it are
in test_transaction.py, the real SGLang server in tests/smoke.
"""

import asyncio
import multiprocessing
import os
import signal
import time
from datetime import timedelta

import pytest
import torch

from megatron_matpo.errors import EngineRejected, EngineUnreachable, WeightSyncError
from megatron_matpo.launch.ports import free_ports
from megatron_matpo.weight_sync.broadcast import BroadcastTransport
from megatron_matpo.weight_sync.transaction import Transaction
from megatron_matpo.weight_sync.verify import Verifier
from tests.helpers.scripted_fake_engine import SHAPE

WEIGHTS = [
    ("a", torch.arange(6.0).view(2, 3)),
    ("b", torch.ones(5).bfloat16()),
    ("c", torch.rand(9)),
]


def _engine(pipe):
    """The engine's side: SGLang's steps to join, then one broadcast per tensor."""
    from torch import distributed as dist
    from torch.distributed import distributed_c10d as c10d

    pipe.send("imported")
    join = pipe.recv()
    store, rank, size = next(
        c10d.rendezvous(f"tcp://127.0.0.1:{join['port']}", join["rank"], join["size"])
    )
    group, _ = c10d._new_process_group_helper(
        size,
        rank,
        [],
        c10d.Backend("gloo"),
        c10d.PrefixStore(join["name"], store),
        group_name=join["name"],
        timeout=timedelta(seconds=60),
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    pipe.send("joined")
    while (request := pipe.recv()) is not None:
        pieces = zip(*(request[k] for k in ("names", "dtypes", "shapes")), strict=True)
        received = {name: torch.empty(s, dtype=getattr(torch, d)) for name, d, s in pieces}
        works = [
            dist.broadcast(tensor, src=0, group=group, async_op=True)
            for tensor in received.values()
        ]
        for work in works:
            work.wait()
        pipe.send({name: tensor.float().tolist() for name, tensor in received.items()})


class FakeEngine:
    """Speaks `EngineControl`; `mode` says how it misbehaves."""

    def __init__(self, mode="good", name=""):
        self.url = f"fake://{mode}{name}"
        self.mode = mode
        self.version = "default"
        self.weights = {}
        self.num_buckets = 0
        self.is_over = False
        self.one_at_a_time = asyncio.Lock()
        self.pipe, child = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_engine, args=(child,), daemon=True)
        self.process.start()

    async def pause(self, **_):
        pass

    async def resume(self, **_):
        pass

    async def wait_ready(self, **_):
        assert await asyncio.to_thread(self.pipe.recv) == "imported"

    async def init_weights_update_group(self, **join):
        if self.mode == "refuses":
            raise EngineRejected("fake engine: no")
        if self.mode == "absent":
            await asyncio.sleep(3600)
        self.pipe.send(
            {
                "port": join["master_port"],
                "rank": join["rank_offset"],
                "size": join["world_size"],
                "name": join["group_name"],
            }
        )
        assert await asyncio.to_thread(self.pipe.recv) == "joined"

    async def update_weights_from_distributed(self, **request):
        if self.mode == "hangs":
            await asyncio.sleep(3600)
        if self.mode == "fails":
            raise EngineRejected("fake engine: out of memory")
        assert request["load_format"] is None, "over gloo nothing is flattened"
        if self.mode == "dies" and "c" in request["names"]:
            self.process.kill()
            raise EngineUnreachable("fake engine: connection lost")
        if self.mode == "freezes" and "c" in request["names"]:
            os.kill(self.process.pid, signal.SIGSTOP)
        async with self.one_at_a_time:
            self.pipe.send({k: request[k] for k in ("names", "dtypes", "shapes")})
            self.weights |= await asyncio.to_thread(self.receive)
        self.num_buckets += 1
        if request["weight_version"] is not None:
            self.version = request["weight_version"]

    def receive(self):
        while not self.pipe.poll(0.05):
            if self.is_over:
                return {}
        return self.pipe.recv()

    async def weight_version(self, **_):
        return self.version

    async def close(self):
        self.end()

    def end(self):
        """Kill and reap: a zombie child would confuse tests that look for processes."""
        self.is_over = True
        self.process.kill()
        self.process.join(10)


def sync_with(engines, timeout_s=60.0, bucket_bytes=1 << 20):
    return Transaction(
        lambda: iter(WEIGHTS),
        engines,
        BroadcastTransport(
            bucket_bytes=bucket_bytes,
            ranks_per_engine=1,
            host="127.0.0.1",
            port=free_ports("127.0.0.1", 1)[0],
            backend="gloo",
        ),
        Verifier("version", SHAPE, on_gpu=False),
        timeout_s=timeout_s,
        start_timeout_s=60.0,
    )


@pytest.mark.timeout(120)
def test_two_engines_receive_every_tensor_in_several_buckets(monkeypatch):
    engines = [FakeEngine(name=1), FakeEngine(name=2)]
    # As in a trainer rank, which torchrun starts with this set; the engines are started without.
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    sync = sync_with(engines, bucket_bytes=16)
    sync.connect()
    for version in (4, 5):
        assert sync.push(version) == version
        expected = {name: tensor.float().tolist() for name, tensor in WEIGHTS}
        for engine in engines:
            assert engine.weights == expected
            assert engine.version == str(version)
            assert engine.num_buckets == 3
            engine.weights, engine.num_buckets = {}, 0
    assert sync.report.num_bytes == 6 * 4 + 5 * 2 + 9 * 4
    sync.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("refuses", "forming the weight-sync group: fake://refuses: .*no"),
        ("absent", r"forming.*fake://absent.*weight_sync.timeout_s=3\)"),
        ("hangs", r"'deliver': bucket 0.*weight_sync.timeout_s=3\).*stay paused"),
        ("fails", "'deliver': bucket 0.*fake://fails: .*out of memory"),
        ("dies", r"'deliver': bucket 2 \(from c\).*fake://dies: .*connection lost"),
        ("freezes", r"'deliver': bucket 2.*fake://freezes.*weight_sync.timeout_s=3\)"),
    ],
)
def test_failures_are_named_inside_the_deadline(mode, message):
    engines = [FakeEngine(mode)]
    if mode in ("dies", "freezes"):
        engines.append(FakeEngine())
    is_late = mode in ("absent", "hangs", "freezes")
    sync = sync_with(engines, timeout_s=3.0 if is_late else 30.0, bucket_bytes=16)
    try:
        with pytest.raises(WeightSyncError, match=message):
            sync.connect()
            started = time.monotonic()
            sync.push(1)
        if mode not in ("refuses", "absent"):
            assert time.monotonic() - started < 30
    finally:
        for engine in engines:
            engine.end()
