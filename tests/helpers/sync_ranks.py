"""A function for gloo ranks: a trainer whose pipeline stages push to one more rank, the engine."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Client, Connection, Listener
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
from tests.helpers.gloo_engine import GlooEngine, engine_side
from tests.helpers.megatron_ranks import layout, make_actor

BUCKET_BYTES = 8192
CONTROL_S = 20.0


class _RefusingEngine(GlooEngine):
    """Takes the first stage's buckets and refuses the next one's."""

    async def update_weights_from_distributed(self, **request: Any) -> None:
        if request["group_name"].endswith("_1"):
            raise EngineRejected(f"{self.url}: no more")
        await super().update_weights_from_distributed(**request)


def push_from_stages(
    info: RankInfo, config: Config, folder: Path, port: int, timeout_s: float, failure: str
) -> dict[str, Any]:
    """The last rank is the engine, the others train; two pushes with a change in between.

    Args:
        info: of this rank.
        config: whose layout has a rank less than `info` says.
        folder: for the socket between rank 0 and the engine.
        port: where the groups meet.
        timeout_s: `weight_sync.timeout_s`.
        failure: `` (none), `refuses`: the engine does not take the second stage's tensors, or
            `dies`: the second stage's sender fails in its export.
    """
    num_trainers = info.world_size - 1
    address = str(folder / "engine")
    if info.rank == num_trainers:
        _be_engine(address)
        return {}
    with layout(RankInfo(info.rank, num_trainers, info.port), config) as state:
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
        engines = []
        if state.rank == 0:
            kind = _RefusingEngine if failure == "refuses" else GlooEngine
            engines.append(kind(_connected(address), shape=shape))

        def lend():
            for number, item in enumerate(actor.lend(by_stage=True)):
                if failure == "dies" and state.pp_rank == 1 and number == 3:
                    raise RuntimeError("no memory for a scripted reason")
                yield item

        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
        agree = partial(share_bytes, group=group, device=torch.device("cpu"))
        sync = Transaction(
            lend,
            engines,
            transport,
            verifier,
            timeout_s=timeout_s,
            start_timeout_s=60.0,
            recovery=Recovery(FixedMembership(1), agree),
        )
        started = time.monotonic()
        try:
            return _pushes(sync, actor, engines)
        except WeightSyncError as error:
            return {"error": str(error), "seconds": time.monotonic() - started}
        finally:
            if engines:
                engines[0].pipe.send(None)
            sync.close()


def _pushes(sync: Transaction, actor: Any, engines: list[GlooEngine]) -> dict[str, Any]:
    sync.connect()
    result: dict[str, Any] = {"pushed": [], "exported": [], "groups": []}
    for version in (1, 2):
        sync.push(version)
        exported = dict(actor.export())
        if engines:
            result["pushed"].append(dict(engines[0].weights))
            result["exported"].append({name: tensor.clone() for name, tensor in exported.items()})
            result["groups"].append([name[-1] for name in engines[0].groups])
            result["checked"] = sorted(sync._verifier.expected)
            engines[0].groups.clear()
        with torch.no_grad():
            for model in actor._models:
                for parameter in model.parameters():
                    parameter.mul_(1.25)
    return result


def _be_engine(address: str) -> None:
    with Listener(address, "AF_UNIX") as listener, listener.accept() as pipe:  # noqa: SIM117
        with suppress(RuntimeError):  # its sender is gone
            engine_side(pipe)


def _connected(address: str) -> Connection:
    deadline = time.monotonic() + 30
    while True:
        try:
            return Client(address, "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < deadline, "the engine does not listen"
            time.sleep(0.05)
