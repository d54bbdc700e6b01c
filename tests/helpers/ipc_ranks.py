"""Trainer ranks that push through shared memory to an engine of several ranks."""

from __future__ import annotations

import asyncio
import datetime
import pickle
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import distributed as dist

from megatron_matpo.trainer.rollouts import share_bytes
from megatron_matpo.weight_sync.ipc import IpcTransport, TrainerRanks
from megatron_matpo.weight_sync.membership import FixedMembership, Recovery
from megatron_matpo.weight_sync.shared_buffers import HostBuffer
from megatron_matpo.weight_sync.transaction import Transaction
from megatron_matpo.weight_sync.verify import Verifier
from tests.helpers.dist import RankInfo
from tests.helpers.scripted_fake_engine import SHAPE, ScriptedFakeEngine


class ManyRankEngine(ScriptedFakeEngine):
    """Each of its ranks opens its own payload; one tensor is a bucket."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.held: dict[str, list[float]] = {}

    async def update_weights_from_tensor(
        self, *, payloads: Sequence[bytes], weight_version: str | None, **settings: Any
    ) -> None:
        await asyncio.sleep(0.02)  # a writer that did not wait would be seen
        for rank, payload in enumerate(payloads):
            flat = pickle.loads(payload)
            (item,) = flat["metadata"]
            data = flat["flattened_tensor"].view(torch.float32)
            self.held[f"{rank} {item.name}"] = data.tolist()
        self.version = weight_version or self.version


def push_twice(
    info: RankInfo, writers: Sequence[Sequence[int]]
) -> list[tuple[str, dict[str, list[float]]]]:
    """Version and weights of every engine, on rank 0; entry i of `writers` is for engine i."""
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{info.port}",
        rank=info.rank,
        world_size=info.world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        group = dist.group.WORLD
        assert isinstance(group, dist.ProcessGroup)
        count = len(writers) if info.rank == 0 else 0
        engines = [ManyRankEngine(str(i)) for i in range(count)]
        # Ranks differ, so that it shows whose buffer was opened.
        weights = {f"w{i}": torch.full((4,), float(10 * i + info.rank)) for i in range(5)}
        sync = Transaction(
            lambda: iter(weights.items()),
            engines,
            IpcTransport(
                bucket_bytes=16,
                writers={f"fake://{i}": own for i, own in enumerate(writers)},
                make_buffer=HostBuffer,
                ranks=TrainerRanks(group),
                keeps_buffers=False,
            ),
            Verifier("version", SHAPE, on_gpu=False),
            timeout_s=30.0,
            start_timeout_s=30.0,
            recovery=Recovery(
                FixedMembership(count),
                partial(share_bytes, group=dist.new_group(), device=torch.device("cpu")),
            ),
        )
        sync.connect()
        for version in (1, 2):
            sync.push(version)
        sync.close()
        return [(engine.version, engine.held) for engine in engines]
    finally:
        dist.destroy_process_group()
