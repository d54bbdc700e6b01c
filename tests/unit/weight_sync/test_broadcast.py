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

import pytest
import torch

from megatron_matpo.errors import EngineRejected, EngineUnreachable, WeightSyncError
from megatron_matpo.ports import free_ports
from megatron_matpo.weight_sync.broadcast import BroadcastTransport
from megatron_matpo.weight_sync.transaction import Transaction
from megatron_matpo.weight_sync.verify import Verifier
from tests.helpers.gloo_engine import GlooEngine, engine_side
from tests.helpers.scripted_fake_engine import SHAPE

WEIGHTS = [
    ("a", torch.arange(6.0).view(2, 3)),
    ("b", torch.ones(5).bfloat16()),
    ("c", torch.rand(9)),
]


class FakeEngine(GlooEngine):
    """In a process of its own; `mode` says how it misbehaves."""

    def __init__(self, mode="good", name=""):
        pipe, child = multiprocessing.Pipe()
        super().__init__(pipe, f"fake://{mode}{name}")
        self.mode = mode
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=engine_side, args=(child,), daemon=True)
        self.process.start()

    async def init_weights_update_group(self, **join):
        if self.mode == "refuses":
            raise EngineRejected("fake engine: no")
        if self.mode == "absent":
            await asyncio.sleep(3600)
        await super().init_weights_update_group(**join)

    async def update_weights_from_distributed(self, **request):
        if self.mode == "hangs":
            await asyncio.sleep(3600)
        if self.mode == "fails":
            raise EngineRejected("fake engine: out of memory")
        if self.mode == "dies" and "c" in request["names"]:
            self.process.kill()
            raise EngineUnreachable("fake engine: connection lost")
        if self.mode == "freezes" and "c" in request["names"]:
            os.kill(self.process.pid, signal.SIGSTOP)
        await super().update_weights_from_distributed(**request)

    async def close(self):
        self.end()

    def end(self):
        """Kill and reap: a zombie child would confuse tests that look for processes."""
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
        expected = {name: tensor.float() for name, tensor in WEIGHTS}
        for engine in engines:
            torch.testing.assert_close(engine.weights, expected, rtol=0, atol=0)
            assert engine.version == str(version)
            assert len(engine.groups) == 3
            engine.weights, engine.groups = {}, []
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
