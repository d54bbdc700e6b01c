"""Optimizer state as sharded tensors that look like the model's parameters.

Megatron's own layout-independent format misplaces state when a gradient buffer has padding between
buckets, which tied embeddings under pipeline parallelism bring about (`distrib_optimizer.py`,
`sharded_param_state_fully_reshardable`: "will be padded with zeros which can lead to data
corruption"); its loader also fails with torch's AdamW (`distrib_optimizer.py:940,2101`). Here every
parameter is treated on its own:

* fp32 parameter and both moments get the parameter's shape, sharding and (prefixed) key, so that
  another layout can load them;
* a save sums the data-parallel ranks' shards as integers, which is exact, on the first of them; a
  load reads the whole and keeps the own shard;
* tensors pass through host memory one at a time on GPUs; the first data-parallel rank holds all of
  its stage's state there until it is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_matpo.megatron.model import PolicyModel
from megatron_matpo.megatron.parallel import ParallelState, data_group

_KINDS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Shard:
    """What this rank's optimizer holds of one parameter."""

    start: int
    stop: int
    """Range of the flattened parameter; empty if other data-parallel ranks hold all of it."""
    tensors: dict[str, Tensor]
    """By kind, flat float32 [stop - start]."""


def member_of(optimizer: MegatronOptimizer) -> Any:
    """The one distributed optimizer of a dense model (Megatron chains one per parameter kind)."""
    (member,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return member


def describe(
    model: PolicyModel,
    optimizer: MegatronOptimizer,
    model_state: dict[str, Any],
    state: ParallelState,
    is_loading: bool,
) -> dict[str, Any]:
    """Sharded optimizer state of this rank. Collective over the data-parallel ranks.

    Args:
        model: this rank's unwrapped chunk.
        optimizer: its optimizer.
        model_state: `model.sharded_state_dict()`.
        state: this rank's position.
        is_loading: give every rank room for its whole stage, instead of the first data-parallel
            rank the values.
    """
    member = member_of(optimizer)
    result: dict[str, Any] = {"step": _step(member)}
    for name, parameter, base in _bases(model, model_state):
        shard = _shard(member, parameter)
        for kind in _KINDS:
            if is_loading:
                full = torch.empty(parameter.shape, dtype=torch.float32)
            else:
                full = _collect(shard, kind, parameter, state)
                if state.dp_rank:
                    continue
            # Layers share a key and differ in their place along an axis; names are unique.
            changes: dict[str, Any] = {"key": f"optimizer.{kind}.{base.key}", "data": full}
            if isinstance(base, ShardedTensor):
                changes["dtype"] = full.dtype
            result[f"{kind} {name}"] = replace(base, **changes)
    return result


def restore(
    model: PolicyModel,
    optimizer: MegatronOptimizer,
    model_state: dict[str, Any],
    loaded: dict[str, Any],
) -> None:
    """Take over what `describe(..., is_loading=True)` asked for. Nothing is communicated."""
    member = member_of(optimizer)
    for name, parameter, _ in _bases(model, model_state):
        shard = _shard(member, parameter)
        for kind, tensor in shard.tensors.items():
            full = loaded[f"{kind} {name}"]
            tensor.data.copy_(full.reshape(-1)[shard.start : shard.stop])
    _set_step(member, loaded["step"])


def _bases(
    model: PolicyModel, model_state: dict[str, Any]
) -> Iterator[tuple[str, Tensor, ShardedTensor | ShardedTensorFactory]]:
    """Trained parameters in the model's order: name, parameter, description for checkpoints."""
    by_parameter = {
        id(base.data): base
        for base in model_state.values()
        if isinstance(base, ShardedTensor | ShardedTensorFactory)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, by_parameter[id(parameter)]


def _shard(member: Any, parameter: Tensor) -> _Shard:
    """This rank's shard of a parameter, as Megatron's distributed optimizer laid it out."""
    if parameter not in member.model_param_gbuf_map:
        return _Shard(0, 0, {})
    owned = member._get_model_param_range_map(parameter)["param"]
    group, index = member.model_param_group_index_map[parameter]
    main = member.optimizer.param_groups[group]["params"][index]
    moments = member.optimizer.state[main]
    tensors = {"param": main, **{kind: moments[kind] for kind in _KINDS[1:]}}
    return _Shard(owned.start, owned.end, tensors)


def _collect(shard: _Shard, kind: str, parameter: Tensor, state: ParallelState) -> Tensor:
    """The whole tensor on the host of the first data-parallel rank; rubbish on the others."""
    full = torch.zeros(parameter.numel(), dtype=torch.float32, device=state.device)
    if kind in shard.tensors:
        full[shard.start : shard.stop] = shard.tensors[kind].detach().view(-1)
    if state.dp_size > 1:
        group = data_group()
        # As integers: a float sum would turn -0.0 into 0.0.
        dist.reduce(full.view(torch.int32), dst=dist.get_global_rank(group, 0), group=group)
    return full.view(parameter.shape).cpu()


def _step(member: Any) -> int:
    """Updates made: torch counts per parameter, Transformer Engine's FusedAdam per group."""
    for group in member.optimizer.param_groups:
        if "step" in group:
            return int(group["step"])
    return next((int(s["step"]) for s in member.optimizer.state.values() if "step" in s), 0)


def _set_step(member: Any, step: int) -> None:
    """The inverse of `_step`."""
    if isinstance(member.optimizer, torch.optim.AdamW):
        for state in member.optimizer.state.values():
            state["step"].fill_(float(step))
        return
    for group in member.optimizer.param_groups:
        group["step"] = step
