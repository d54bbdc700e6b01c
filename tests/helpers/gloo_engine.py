"""A stand-in for an engine that really receives: SGLang's steps to join, one broadcast per tensor.

`engine_side` runs in a process of its own, `GlooEngine` is its client and speaks `EngineControl`.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

import torch

from megatron_matpo.weight_sync.checksums import host_checksum
from megatron_matpo.weight_sync.layout import EngineLayout


def engine_side(pipe):
    """Serve until told to stop."""
    from torch import distributed as dist
    from torch.distributed import distributed_c10d as c10d

    pipe.send("imported")
    groups = {}
    while (request := pipe.recv()) is not None:
        if "join" in request:
            join = request["join"]
            store, rank, size = next(
                c10d.rendezvous(f"tcp://127.0.0.1:{join['port']}", join["rank"], join["size"])
            )
            groups[join["name"]], _ = c10d._new_process_group_helper(
                size,
                rank,
                [],
                c10d.Backend("gloo"),
                c10d.PrefixStore(join["name"], store),
                group_name=join["name"],
                timeout=timedelta(seconds=60),
            )
            c10d._world.pg_group_ranks[groups[join["name"]]] = {i: i for i in range(size)}
            pipe.send("joined")
            continue
        pieces = zip(*(request[k] for k in ("names", "dtypes", "shapes")), strict=True)
        received = {name: torch.empty(s, dtype=getattr(torch, d)) for name, d, s in pieces}
        group = groups[request["group"]]
        works = [
            dist.broadcast(tensor, src=0, group=group, async_op=True)
            for tensor in received.values()
        ]
        for work in works:
            work.wait()
        pipe.send({name: tensor.float().numpy() for name, tensor in received.items()})


class GlooEngine:
    """Client of `engine_side` behind `pipe`; keeps what it received, as float32."""

    def __init__(self, pipe, url="fake://engine", shape=None):
        self.url, self.pipe, self.shape = url, pipe, shape
        self.version = "default"
        self.weights: dict[str, torch.Tensor] = {}
        self.groups: list[str] = []
        """That it received from, bucket by bucket."""
        self.is_paused = self.is_over = False
        self.one_at_a_time = asyncio.Lock()

    async def pause(self, **_):
        self.is_paused = True

    async def resume(self, **_):
        self.is_paused = False

    async def wait_ready(self, **_):
        assert await asyncio.to_thread(self.pipe.recv) == "imported"

    async def init_weights_update_group(self, **join):
        self.pipe.send(
            {
                "join": {
                    "port": join["master_port"],
                    "rank": join["rank_offset"],
                    "size": join["world_size"],
                    "name": join["group_name"],
                }
            }
        )
        assert await asyncio.to_thread(self.pipe.recv) == "joined"

    async def update_weights_from_distributed(self, **request):
        assert request["load_format"] is None, "over gloo nothing is flattened"
        async with self.one_at_a_time:
            wanted = {k: request[k] for k in ("names", "dtypes", "shapes")}
            self.pipe.send(wanted | {"group": request["group_name"]})
            received = await asyncio.to_thread(self.receive)
        self.weights |= {name: torch.from_numpy(value) for name, value in received.items()}
        self.groups.append(request["group_name"])
        if request["weight_version"] is not None:
            self.version = request["weight_version"]

    def receive(self):
        while not self.pipe.poll(0.05):
            if self.is_over:
                return {}
        return self.pipe.recv()

    async def weight_version(self, **_):
        return self.version

    async def weight_checksums(self, **_):
        layout = EngineLayout(self.shape)
        return [
            {
                engine_name: host_checksum(parts[0])
                for name, tensor in self.weights.items()
                for engine_name, parts in layout.take(name, tensor)
            }
        ]

    async def close(self):
        self.is_over = True
