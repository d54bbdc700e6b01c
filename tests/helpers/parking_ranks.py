"""Functions on gloo ranks about `park`, `unpark` and `export_everywhere`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_matpo.config import Config
from megatron_matpo.megatron.batch import MicroBatch
from tests.helpers.dist import RankInfo
from tests.helpers.megatron_ranks import layout, make_actor, share
from tests.helpers.tiny import weighted_loss


def train(
    info: RankInfo, config: Config, batches: Sequence[MicroBatch], folder: Path, parks: bool
) -> dict[str, Any]:
    """Four updates with a checkpoint after the second; if `parks`, parked in between throughout."""
    with layout(info, config) as state:
        actor = make_actor(config, state)
        mine = share(batches, state)
        story: dict[str, Any] = {"moved": [], "held": []}
        results = []
        for i in range(4):
            if parks:
                story["moved"].append(actor.park())
                story["held"].append(_held(actor))
            scores = actor.score(mine)
            if i == 2:
                actor.save(folder, i, {"updates": i})
                actor.finish_save()
            exported = dict(actor.export())
            if parks:
                actor.unpark()
            results.append((scores, exported, asdict(actor.update(mine, weighted_loss, i))))
        story["state_bytes"] = _held(actor)
        return story | {"results": results, "weights": dict(actor.export())}


def _held(actor: Any) -> int:
    """Bytes of gradient buffers and of the optimizer's tensors that are not on the host copies."""
    kept = {t.untyped_storage().data_ptr() for t in actor._parking._host.values()}
    buffers = [b for m in actor._models for b in (*m.buffers, *m.expert_parallel_buffers)]
    storages = {b.grad_data.untyped_storage().data_ptr(): b.grad_data for b in buffers}
    for tensor in actor._parking._state():
        storages[tensor.untyped_storage().data_ptr()] = tensor
    return sum(
        tensor.untyped_storage().nbytes() for at, tensor in storages.items() if at not in kept
    )


def resumed_while_parked(
    info: RankInfo, config: Config, batches: Sequence[MicroBatch], folder: Path
) -> Any:
    """Restore into a parked actor, then make the next update."""
    with layout(info, config) as state:
        actor = make_actor(config, state)
        actor.park()
        extra = actor.restore(folder)
        assert extra is not None
        actor.unpark()
        return actor.update(share(batches, state), weighted_loss, extra["updates"])


def both_exports(
    info: RankInfo, config: Config, dtype: torch.dtype | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What rank 0 gets (nothing elsewhere), and what everybody gets."""
    with layout(info, config) as state:
        actor = make_actor(config, state)
        own = {p.untyped_storage().data_ptr() for m in actor._models for p in m.parameters()}
        everywhere = dict(actor.export_everywhere(dtype))
        for name, tensor in everywhere.items():
            assert tensor.untyped_storage().data_ptr() not in own, f"{name} is the caller's"
        return dict(actor.export(dtype)), everywhere
