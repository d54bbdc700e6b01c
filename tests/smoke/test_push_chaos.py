"""Proves that a push goes on without the server that freezes or dies in it, on four real servers.

One dies in a bucket, one between the last bucket and the verification, one freezes. Whatever serves
afterwards holds what the trainer sent, by its own checksums. The tests share the servers and run in
order.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_matpo.errors import EngineError
from megatron_matpo.ports import free_ports
from megatron_matpo.rollout.generation import Generation, SamplingParams
from megatron_matpo.types import PolicyVersion
from megatron_matpo.weight_sync.broadcast import BroadcastTransport
from megatron_matpo.weight_sync.engines import Engines
from megatron_matpo.weight_sync.layout import EngineShape
from megatron_matpo.weight_sync.membership import FixedMembership, Recovery
from megatron_matpo.weight_sync.transaction import Transaction
from megatron_matpo.weight_sync.verify import Verifier
from tests.helpers.sglang_servers import SglangServer, server_marks, sglang_servers
from tests.helpers.tiny import make_tiny_model

SHAPE = EngineShape(num_ranks=1, num_kv_heads=2, dtype=torch.float32, on_cpu=True)
LIMIT_S = 60.0
SHORT_LIMIT_S = 6.0

pytestmark = server_marks(500)


@dataclass
class Site:
    servers: list[SglangServer]
    weights: dict[str, Tensor]

    def changed(self, seed: int) -> dict[str, Tensor]:
        made = torch.Generator().manual_seed(seed)
        return {n: t + 0.05 * torch.randn(t.shape, generator=made) for n, t in self.weights.items()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("chaos")
    model = make_tiny_model(folder / "model", tied=False)
    with sglang_servers(model, folder, 4) as servers:
        yield Site(servers, load_file(model / "model.safetensors"))


class Seen(FixedMembership):
    """Remembers what it was told."""

    def __init__(self, num_engines: int) -> None:
        super().__init__(num_engines)
        self.reasons: dict[int, str] = {}

    async def lost(self, reasons: Mapping[int, str]) -> None:
        self.reasons |= reasons
        await super().lost(reasons)


class ActsBeforeVerifying(Verifier):
    """Does something between the last bucket and the first verification."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__("full", SHAPE, on_gpu=False)
        self._act: Callable[[], None] | None = act

    async def check(self, version: PolicyVersion, engines: Engines) -> None:
        act, self._act = self._act, None
        if act is not None:
            act()
        await super().check(version, engines)


def push(
    servers: list[SglangServer],
    weights: dict[str, Tensor],
    version: int,
    *,
    on_half: Callable[[], None] = lambda: None,
    on_delivered: Callable[[], None] = lambda: None,
    timeout_s: float = LIMIT_S,
) -> dict[int, str]:
    """Push with one retry; returns who was lost and why."""
    num_exports = 0

    def export() -> Iterator[tuple[str, Tensor]]:
        nonlocal num_exports
        num_exports += 1
        for index, item in enumerate(weights.items()):
            if num_exports == 1 and index == len(weights) // 2:
                on_half()
            yield item

    (port,) = free_ports("127.0.0.1", 1)
    seen = Seen(len(servers))
    sync = Transaction(
        export,
        [server.client() for server in servers],
        BroadcastTransport(
            bucket_bytes=8192, ranks_per_engine=1, host="127.0.0.1", port=port, backend="gloo"
        ),
        ActsBeforeVerifying(on_delivered),
        timeout_s=timeout_s,
        start_timeout_s=LIMIT_S,
        recovery=Recovery(seen, retries=1, answer_timeout_s=3.0),
    )
    sync.connect()
    try:
        assert sync.push(version) == version
    finally:
        sync.close()
    return seen.reasons


def assert_serve(servers: list[SglangServer], weights: dict[str, Tensor], version: int) -> None:
    """They hold these weights by their own checksums, and sample with them."""

    async def check() -> list[Generation]:
        clients = [server.client(LIMIT_S) for server in servers]
        verifier = Verifier("full", SHAPE, on_gpu=False)
        for _ in verifier.watch(iter(weights.items())):
            pass
        try:
            await verifier.check(version, Engines(clients, LIMIT_S))
            params = SamplingParams(6, temperature=0.0)
            return [await client.generate([5, 6, 7], params) for client in clients]
        finally:
            for client in clients:
                await client.close()

    for turn in asyncio.run(check()):
        assert {span.version for span in turn.versions} == {version}


def assert_does_not_serve(server: SglangServer) -> None:
    async def ask() -> None:
        client = server.client(3.0)
        try:
            await client.generate([5, 6, 7], SamplingParams(1))
        finally:
            await client.close()

    with pytest.raises(EngineError):
        asyncio.run(ask())


def test_one_that_dies_in_a_bucket_is_left_out(site: Site) -> None:
    killed, others = site.servers[3], site.servers[:3]
    assert push(site.servers, site.changed(1), 1) == {}
    lost = push(site.servers, site.changed(2), 2, on_half=lambda: killed.signal(signal.SIGKILL))
    assert list(lost) == [3]
    assert_serve(others, site.changed(2), 2)


def test_one_that_dies_before_it_is_verified_is_left_out(site: Site) -> None:
    killed, others = site.servers[2], site.servers[:2]
    lost = push(
        site.servers[:3], site.changed(3), 3, on_delivered=lambda: killed.signal(signal.SIGKILL)
    )
    assert list(lost) == [2]
    assert_serve(others, site.changed(3), 3)


def test_one_that_freezes_in_a_bucket_is_left_out_and_serves_nothing_when_it_thaws(
    site: Site,
) -> None:
    frozen, other = site.servers[1], site.servers[0]
    weights = site.changed(4)
    started = time.monotonic()
    lost = push(
        site.servers[:2],
        weights,
        4,
        on_half=lambda: frozen.signal(signal.SIGSTOP),
        timeout_s=SHORT_LIMIT_S,
    )
    assert time.monotonic() - started < 6 * SHORT_LIMIT_S
    assert list(lost) == [1]
    assert_serve([other], weights, 4)
    frozen.signal(signal.SIGCONT)
    assert_does_not_serve(frozen)
