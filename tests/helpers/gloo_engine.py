"""A stand-in for an engine that really receives: SGLang's steps to join, one broadcast per tensor.

`engine_side` runs in a process of its own (`python -m tests.helpers.gloo_engine SOCKET`, or however
a test starts it), `GlooEngine` is its client and speaks `EngineControl`, one verb at a time as
SGLang's scheduler does. A broken collective is an answer, not the engine's end.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta
from multiprocessing.connection import Connection, Listener
from typing import Any

import torch

from megatron_matpo.errors import EngineRejected, EngineUnreachable
from megatron_matpo.weight_sync.checksums import host_checksum
from megatron_matpo.weight_sync.layout import EngineLayout


def engine_side(pipe: Connection) -> None:
    """Serve until told to stop, or until the client is gone."""
    groups: dict[str, Any] = {}
    try:
        while (message := pipe.recv()) is not None:
            number, verb, request = message
            try:
                answer = "done", _VERBS[verb](groups, **request)
            except RuntimeError as error:
                answer = "failed", str(error)
            pipe.send((number, *answer))
    except (EOFError, BrokenPipeError):
        pass


def _flush(groups: dict[str, Any]) -> None:
    """Answer, as only an engine does that is stuck nowhere."""


def _join(groups: dict[str, Any], *, port: int, rank: int, size: int, name: str) -> None:
    from torch import distributed as dist
    from torch.distributed import distributed_c10d as c10d

    store, rank, size = next(c10d.rendezvous(f"tcp://127.0.0.1:{port}", rank, size))
    groups[name], _ = c10d._new_process_group_helper(
        size,
        rank,
        [],
        c10d.Backend("gloo"),
        c10d.PrefixStore(name, store),
        group_name=name,
        timeout=timedelta(seconds=60),
    )
    c10d._world.pg_group_ranks[groups[name]] = {i: i for i in range(size)}
    assert isinstance(groups[name], dist.ProcessGroup)


def _receive(
    groups: dict[str, Any],
    *,
    names: list[str],
    dtypes: list[str],
    shapes: list[list[int]],
    group: str,
) -> dict[str, Any]:
    from torch import distributed as dist

    pieces = zip(names, dtypes, shapes, strict=True)
    received = {name: torch.empty(s, dtype=getattr(torch, d)) for name, d, s in pieces}
    works = [
        dist.broadcast(tensor, src=0, group=groups[group], async_op=True)
        for tensor in received.values()
    ]
    for work in works:
        assert work is not None
        work.wait()
    return {name: tensor.float().numpy() for name, tensor in received.items()}


_VERBS = {"flush": _flush, "join": _join, "receive": _receive}


class GlooEngine:
    """Client of `engine_side` behind `pipe`; keeps what it received, as float32."""

    def __init__(self, pipe, url="fake://engine", shape=None):
        self.url, self.pipe, self.shape = url, pipe, shape
        self.version = "default"
        self.weights: dict[str, torch.Tensor] = {}
        self.groups: list[str] = []
        """That it received from, bucket by bucket."""
        self.is_paused = False
        self.num_asked = 0
        self.one_at_a_time = asyncio.Lock()

    def is_alive(self):
        return True

    async def ask(self, verb, **request):
        async with self.one_at_a_time:
            self.num_asked += 1
            try:
                self.pipe.send((self.num_asked, verb, request))
                number = 0
                while number != self.num_asked:  # else of a request that nobody waits for
                    if self.pipe.poll():
                        number, how, answer = self.pipe.recv()
                    elif not self.is_alive():
                        raise EngineUnreachable("connection lost")
                    else:
                        await asyncio.sleep(0.002)
            except (OSError, EOFError) as error:
                raise EngineUnreachable("connection lost") from error
        if how == "failed":
            raise EngineRejected(answer)
        return answer

    async def pause(self, **_):
        self.is_paused = True

    async def resume(self, **_):
        self.is_paused = False

    async def wait_ready(self, **_):
        await self.ask("flush")

    async def flush_cache(self, **_):
        await self.ask("flush")

    async def init_weights_update_group(self, **join):
        await self.ask(
            "join",
            port=join["master_port"],
            rank=join["rank_offset"],
            size=join["world_size"],
            name=join["group_name"],
        )

    async def update_weights_from_distributed(self, **request):
        assert request["load_format"] is None, "over gloo nothing is flattened"
        wanted = {k: request[k] for k in ("names", "dtypes", "shapes")}
        received = await self.ask("receive", **wanted, group=request["group_name"])
        self.weights |= {name: torch.from_numpy(value) for name, value in received.items()}
        self.groups.append(request["group_name"])
        if request["weight_version"] is not None:
            self.version = request["weight_version"]

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
        pass


if __name__ == "__main__":
    with Listener(sys.argv[1], "AF_UNIX") as listener, listener.accept() as connection:
        engine_side(connection)
