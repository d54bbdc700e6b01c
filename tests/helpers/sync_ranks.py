"""A function for gloo ranks: a trainer whose pipeline stages push to engines in other processes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.errors import EngineRejected, WeightSyncError
from megatron_matpo.trainer.rollouts import share_bytes
from megatron_matpo.trainer.transports import form_senders
from megatron_matpo.weight_sync.broadcast import BroadcastTransport
from megatron_matpo.weight_sync.layout import EngineShape
from megatron_matpo.weight_sync.membership import FixedMembership, Recovery
from megatron_matpo.weight_sync.stages import LocalStage
from megatron_matpo.weight_sync.transaction import Transaction
from megatron_matpo.weight_sync.verify import Verifier
from tests.helpers.dist import RankInfo
from tests.helpers.gloo_engine import GlooEngine
from tests.helpers.matpo import ROOT
from tests.helpers.megatron_ranks import layout, make_actor

BUCKET_BYTES = 8192
CONTROL_S = 20.0


class _Engine(GlooEngine):
    """In a process of its own."""

    def __init__(self, folder: Path, name: str, shape: EngineShape) -> None:
        address = str(folder / name)
        command = [sys.executable, "-m", "tests.helpers.gloo_engine", address]
        self.process = subprocess.Popen(command, cwd=ROOT)
        super().__init__(_connected(address), f"fake://{name}", shape)
        self.refuses = False
        """Buckets of the second stage."""
        self.dies = ""
        """In a bucket of stage `0` or `1`, or before it is to `verify`."""

    def is_alive(self) -> bool:
        return self.process.poll() is None

    async def update_weights_from_distributed(self, **request: Any) -> None:
        stage = request["group_name"][-1]
        if self.refuses and stage == "1":
            raise EngineRejected(f"{self.url}: no more")
        if self.dies == stage:
            self.end()
        await super().update_weights_from_distributed(**request)

    async def weight_version(self, **_: Any) -> str:
        if self.dies == "verify":
            self.end()
        await self.flush_cache()
        return self.version

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def push_from_stages(
    info: RankInfo,
    config: Config,
    folder: Path,
    port: int,
    timeout_s: float,
    failure: str = "",
    deaths: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Two pushes to one engine, with a change of the weights in between.

    Args:
        info: of this rank.
        config: the layout.
        folder: for the sockets between rank 0 and the engines.
        port: where the groups meet.
        timeout_s: `weight_sync.timeout_s`.
        failure: `` (none), `refuses`: the engine does not take the second stage's tensors, or
            `export`: the second stage's sender fails in its export.
        deaths: instead of the second push, one for each of these, tried again: as `_Engine.dies`,
            or `before`: it is found dead when groups are formed. Each time another engine.
    """
    with layout(info, config) as state, ExitStack() as stack:
        actor = make_actor(config, state)
        hf = HfModelConfig.from_folder(config.model.path)
        shape = EngineShape(1, hf.num_kv_heads, torch.float32, on_cpu=True)
        verifier = Verifier("full", shape, on_gpu=False)
        others, follow = form_senders(
            state,
            verifier,
            lambda: LocalStage(state.rank, BUCKET_BYTES, flat=False),
            group_timeout_s=CONTROL_S,
            timeout_s=timeout_s,
        )
        transport = BroadcastTransport(
            bucket_bytes=BUCKET_BYTES,
            ranks_per_engine=1,
            host="127.0.0.1",
            port=port,
            backend="gloo",
            others=others,
            follow=follow,
        )
        engines: list[_Engine] = []
        for number in range((1 + len(deaths) + ("before" in deaths)) * (state.rank == 0)):
            engines.append(_Engine(folder, f"engine{number}", shape))
            stack.callback(engines[-1].end)

        def lend():
            for number, item in enumerate(actor.lend(by_stage=True)):
                if failure == "export" and state.pp_rank == 1 and number == 3:
                    raise RuntimeError("no memory for a scripted reason")
                yield item

        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
        agree = partial(share_bytes, group=group, device=torch.device("cpu"))
        membership = FixedMembership(len(engines))
        sync = Transaction(
            lend,
            engines,
            transport,
            verifier,
            timeout_s=timeout_s,
            start_timeout_s=60.0,
            recovery=Recovery(membership, agree, retries=int(bool(deaths))),
        )
        stack.callback(sync.close)
        for engine in engines[:1]:
            engine.refuses = failure == "refuses"
        started = time.monotonic()
        try:
            return _pushes(sync, actor, engines, membership, deaths or ("",))
        except WeightSyncError as error:
            return {"error": str(error), "seconds": time.monotonic() - started}


def _pushes(
    sync: Transaction,
    actor: Any,
    engines: list[_Engine],
    membership: FixedMembership,
    deaths: Sequence[str],
) -> dict[str, Any]:
    """What the first engine was given, which is what rank 0 exports."""
    sync.connect()
    result: dict[str, Any] = {"pushed": [], "exported": [], "groups": []}
    left = list(engines)
    for version, death in enumerate(("", *deaths), 1):
        if left and death:
            victim = left.pop()
            victim.dies = death
            if death == "before":
                # Everybody knows of another one, so that groups are formed anew.
                asyncio.run(membership.lost({engines.index(left.pop()): "a scripted reason"}))
                victim.end()
        sync.push(version)
        exported = dict(actor.export())
        if engines:
            assert [engine.version for engine in left] == [str(version)] * len(left)
            result["pushed"].append(dict(engines[0].weights))
            result["exported"].append({name: tensor.clone() for name, tensor in exported.items()})
            result["groups"].append([name[-1] for name in engines[0].groups])
            result["checked"] = sorted(sync._verifier.expected)
            result["left"] = len(left)
            engines[0].groups.clear()
        with torch.no_grad():
            for model in actor._models:
                for parameter in model.parameters():
                    parameter.mul_(1.25)
    return result


def _connected(address: str) -> Connection:
    deadline = time.monotonic() + 60
    while True:
        try:
            return Client(address, "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < deadline, "the engine does not listen"
            time.sleep(0.05)
