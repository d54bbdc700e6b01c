"""The push against a fake engine in a process of its own that receives over a real gloo group.

Proves: bytes arrive under their names, versions are read back, and every way in which an engine can
fail ends in a named error inside the deadline. The real SGLang server is in tests/smoke.
"""

import asyncio
import multiprocessing
import time
from datetime import timedelta

import pytest
import torch

from megatron_matpo.config.train import WeightSyncConfig
from megatron_matpo.errors import EngineRejected, WeightSyncError
from megatron_matpo.launch.ports import free_ports
from megatron_matpo.weight_sync.broadcast import BroadcastSync, PushOnce

WEIGHTS = [
    ("a", torch.arange(6.0).view(2, 3)),
    ("b", torch.ones(5).bfloat16()),
    ("c", torch.rand(9)),
]


def _engine(pipe):
    """The engine's side: SGLang's steps to join, then one broadcast per request."""
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
        received = {}
        total = sum(
            torch.Size(s).numel() * getattr(torch, d).itemsize
            for s, d in zip(request["shapes"], request["dtypes"], strict=True)
        )
        data = torch.empty(total, dtype=torch.uint8)
        dist.broadcast(data, src=0, group=group)
        at = 0
        for name, dtype, shape in zip(
            *(request[k] for k in ("names", "dtypes", "shapes")), strict=True
        ):
            kind = getattr(torch, dtype)
            end = at + torch.Size(shape).numel() * kind.itemsize
            received[name] = data[at:end].view(kind).reshape(shape).float().tolist()
            at = end
        pipe.send(received)


class FakeEngine:
    """Speaks `EngineControl`; `mode` says how it misbehaves."""

    def __init__(self, mode="good"):
        self.url = f"fake://{mode}"
        self.mode = mode
        self.version = "default"
        self.weights = {}
        self.pipe, child = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_engine, args=(child,), daemon=True)
        self.process.start()

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
        assert request["load_format"] == "flattened_bucket"
        self.pipe.send({k: request[k] for k in ("names", "dtypes", "shapes")})
        self.weights |= await asyncio.to_thread(self.pipe.recv)
        if self.mode != "forgets" and request["weight_version"] is not None:
            self.version = request["weight_version"]

    async def weight_version(self, **_):
        return self.version

    async def close(self):
        self.end()

    def end(self):
        """Kill and reap: a zombie child would confuse tests that look for processes."""
        self.process.kill()
        self.process.join(10)


def sync_with(engines, timeout_s=60.0):
    return BroadcastSync(
        WeightSyncConfig(timeout_s=timeout_s),
        lambda: iter(WEIGHTS),
        engines,
        ranks_per_engine=1,
        host="127.0.0.1",
        port=free_ports("127.0.0.1", 1)[0],
        backend="gloo",
        start_timeout_s=timeout_s,
    )


@pytest.mark.timeout(120)
def test_two_engines_receive_every_tensor_and_report_the_version(monkeypatch):
    engines = [FakeEngine(), FakeEngine()]
    # As in a trainer rank, which torchrun starts with this set; the engines are started without.
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    sync = sync_with(engines)
    sync.connect()
    assert sync.push(4) == 4
    expected = {name: tensor.float().tolist() for name, tensor in WEIGHTS}
    for engine in engines:
        assert engine.weights == expected
        assert engine.version == "4"
    sync.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("refuses", "forming the weight-sync group.*no"),
        ("absent", r"weight_sync.timeout_s=2\)"),
        ("hangs", r"pushing weights of version 1.*weight_sync.timeout_s=2\)"),
        ("fails", "pushing weights of version 1.*out of memory"),
        ("forgets", "reports weight version 'default' after version 1"),
    ],
)
def test_failures_are_named_inside_the_deadline(mode, message):
    engine = FakeEngine(mode)
    sync = sync_with([engine], timeout_s=2.0 if mode in ("absent", "hangs") else 30.0)
    started = time.monotonic()
    try:
        with pytest.raises(WeightSyncError, match=message):
            sync.connect()
            sync.push(1)
        assert time.monotonic() - started < 30
    finally:
        engine.end()


def test_push_once_lets_only_the_first_through():
    pushed = []

    class Counter:
        def push(self, version):
            pushed.append(version)
            return version

    sync = PushOnce(Counter())
    assert [sync.push(v) for v in (3, 4, 5)] == [3, 3, 3]
    assert pushed == [3]
