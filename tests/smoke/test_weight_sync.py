"""Proves the transaction against two stock SGLang servers, also when one of them freezes or dies.

On the CPU, over gloo, a folder and shared memory, with a random Qwen3 of a few thousand parameters.
The tests share the servers and run in order: one freezes the second server, the last kills one.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_matpo.errors import EngineError, EngineTimeout, WeightSyncError
from megatron_matpo.ports import free_ports
from megatron_matpo.rollout.generation import Generation, SamplingParams
from megatron_matpo.weight_sync.broadcast import BroadcastTransport
from megatron_matpo.weight_sync.disk import DiskTransport
from megatron_matpo.weight_sync.engines import Engines
from megatron_matpo.weight_sync.ipc import IpcTransport
from megatron_matpo.weight_sync.layout import EngineShape
from megatron_matpo.weight_sync.shared_buffers import HostBuffer
from megatron_matpo.weight_sync.transaction import Transaction
from megatron_matpo.weight_sync.transport import Transport
from megatron_matpo.weight_sync.verify import Verifier
from tests.helpers.sglang_servers import SglangServer, server_marks, sglang_servers
from tests.helpers.tiny import make_tiny_model

SHAPE = EngineShape(num_ranks=1, num_kv_heads=2, dtype=torch.float32, on_cpu=True)
LIMIT_S = 60.0
SHORT_LIMIT_S = 6.0

pytestmark = server_marks(400)


@dataclass
class Site:
    servers: list[SglangServer]
    weights: dict[str, Tensor]
    model: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("sync")
    model = make_tiny_model(folder / "model", tied=False)
    with sglang_servers(model, folder, 2) as servers:
        yield Site(servers, load_file(model / "model.safetensors"), model)


def changed(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in weights.items()}


def transaction(
    servers: list[SglangServer],
    weights: dict[str, Tensor],
    transport: Transport | None = None,
    *,
    timeout_s: float = LIMIT_S,
    on_tensor: Callable[[int], None] = lambda index: None,
) -> Transaction:
    def export() -> Iterator[tuple[str, Tensor]]:
        for index, item in enumerate(weights.items()):
            on_tensor(index)
            yield item

    return Transaction(
        export,
        [server.client() for server in servers],
        transport or broadcast(),
        Verifier("full", SHAPE, on_gpu=False),
        timeout_s=timeout_s,
        start_timeout_s=LIMIT_S,
    )


def broadcast() -> BroadcastTransport:
    (port,) = free_ports("127.0.0.1", 1)
    return BroadcastTransport(
        bucket_bytes=8192, ranks_per_engine=1, host="127.0.0.1", port=port, backend="gloo"
    )


def generate(server: SglangServer, timeout_s: float = LIMIT_S) -> Generation:
    async def ask() -> Any:
        client = server.client(timeout_s)
        try:
            return await client.generate([5, 6, 7], SamplingParams(6, temperature=0.0))
        finally:
            await client.close()

    return asyncio.run(ask())


def test_broadcast_reaches_both_and_is_verified_by_their_own_checksums(site: Site) -> None:
    weights = changed(site.weights, 1)
    sync = transaction(site.servers, weights)
    sync.connect()
    before = generate(site.servers[0])
    for version in (1, 2):
        assert sync.push(version) == version
        for server in site.servers:
            assert {span.version for span in generate(server).versions} == {version}
    sync.close()
    assert sync.report.num_bytes == sum(4 * tensor.numel() for tensor in weights.values())
    after = [generate(server) for server in site.servers]
    assert after[0].token_ids == after[1].token_ids
    assert list(before.logprobs) != list(after[0].logprobs)
    assert_other_weights_are_noticed(site, weights)


def assert_other_weights_are_noticed(site: Site, weights: dict[str, Tensor]) -> None:
    async def compare(expected: dict[str, Tensor]) -> None:
        clients = [server.client() for server in site.servers]
        verifier = Verifier("full", SHAPE, on_gpu=False)
        for _ in verifier.watch(iter(expected.items())):
            pass
        try:
            await verifier.check(2, Engines(clients, LIMIT_S))
        finally:
            for client in clients:
                await client.close()
        assert set(verifier.expected) == set(await held(site.servers[0]))

    asyncio.run(compare(weights))
    name = "model.layers.1.mlp.up_proj.weight"
    other = weights[name].clone()
    other[3, 4] = torch.nextafter(other[3, 4], torch.tensor(9.0))
    with pytest.raises(WeightSyncError, match=r"layers\.1\.mlp\.gate_up_proj\.weight has checksum"):
        asyncio.run(compare(weights | {name: other}))


async def held(server: SglangServer) -> dict[str, str]:
    client = server.client()
    try:
        (checksums,) = await client.weight_checksums(deadline_s=LIMIT_S)
    finally:
        await client.close()
    # Not a weight: a table of sines and cosines that the engine makes itself.
    return {name: value for name, value in checksums.items() if "rotary" not in name}


def test_a_folder_reaches_both_too(site: Site, tmp_path: Path) -> None:
    def write(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        folder.mkdir()
        save_file(dict(tensors), folder / "model.safetensors")
        (folder / "config.json").write_text((site.model / "config.json").read_text())

    weights = changed(site.weights, 3)
    sync = transaction(site.servers, weights, DiskTransport(tmp_path / "weights", write))
    sync.connect()
    for version in (3, 4):
        assert sync.push(version) == version
        assert [p.name for p in (tmp_path / "weights").iterdir()] == [f"version_{version}"]
        for server in site.servers:
            assert {span.version for span in generate(server).versions} == {version}
    sync.close()


def test_shared_memory_reaches_both_and_engines_give_their_own_away_in_between(
    site: Site,
) -> None:
    weights = changed(site.weights, 7)
    writers = {server.url: (0,) for server in site.servers}
    ipc = IpcTransport(bucket_bytes=8192, writers=writers, make_buffer=HostBuffer)
    sync = transaction(site.servers, weights, ipc)
    sync.connect()
    sync.push(41)
    served = [generate(server) for server in site.servers]
    sync.release()
    with pytest.raises(EngineTimeout):
        generate(site.servers[0], timeout_s=2.0)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(generate, server) for server in site.servers]
        sync.push(42)
        after = [future.result() for future in waiting]
    sync.close()
    for before, now in zip(served, after, strict=True):
        assert {span.version for span in before.versions} == {41}
        assert {span.version for span in now.versions} == {42}, "nothing was sampled in between"
        assert now.token_ids == before.token_ids
    assert sync.report.num_bytes == sum(4 * tensor.numel() for tensor in weights.values())


def test_a_server_that_freezes_in_the_middle_of_a_push(site: Site) -> None:
    frozen = site.servers[1]
    weights = changed(site.weights, 5)

    def on_tensor(index: int) -> None:
        if index == len(weights) // 2:
            frozen.signal(signal.SIGSTOP)

    sync = transaction(site.servers, weights, timeout_s=SHORT_LIMIT_S, on_tensor=on_tensor)
    sync.connect()
    started = time.monotonic()
    with pytest.raises(WeightSyncError) as caught:
        sync.push(5)
    assert time.monotonic() - started < 5 * SHORT_LIMIT_S
    text = str(caught.value)
    assert "phase 'deliver': bucket" in text
    assert f"weight_sync.timeout_s={SHORT_LIMIT_S:g}" in text
    assert f"{frozen.url} does not answer" in text
    assert "stay paused" in text
    sync.close()
    with pytest.raises(EngineTimeout):
        generate(site.servers[0], timeout_s=3.0)
    frozen.signal(signal.SIGCONT)
    with pytest.raises(EngineTimeout):
        generate(frozen, timeout_s=3.0)


def test_a_server_that_dies_in_the_middle_of_a_push(site: Site) -> None:
    killed = site.servers[0]
    weights = changed(site.weights, 6)

    def on_tensor(index: int) -> None:
        if index == len(weights) // 2:
            killed.signal(signal.SIGKILL)

    client = killed.client()
    asyncio.run(_resume(client))
    sync = transaction([killed], weights, on_tensor=on_tensor)
    sync.connect()
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match=f"phase 'deliver': bucket.*{killed.url}"):
        sync.push(6)
    assert time.monotonic() - started < LIMIT_S, "the broken connection is noticed before that"
    sync.close()
    with pytest.raises(EngineError):
        generate(killed, timeout_s=3.0)


async def _resume(client: Any) -> None:
    """What only a test may do: the server holds a part of version 5."""
    await client.resume(deadline_s=LIMIT_S)
    await client.close()
