"""Optimizer state as sharded tensors that look like the model's parameters.

Megatron's own layout-independent format misplaces state when a gradient buffer has padding between
buckets, which tied embeddings under pipeline parallelism bring about (`distrib_optimizer.py`,
`sharded_param_state_fully_reshardable`: "will be padded with zeros which can lead to data
corruption"); its loader also fails with torch's AdamW (`distrib_optimizer.py:940,2101`). Here every
parameter is treated on its own:

* fp32 parameter and both moments get the parameter's shape, sharding and (prefixed) key, so that
  another layout can load them;
* a save sums the data-parallel ranks' shards as integers, which is exact, on the first of them (for
  an expert: of the ranks that hold it); a load reads the whole and keeps the own shard;
* tensors pass through host memory one at a time on GPUs; the first data-parallel rank holds all of
  its stage's state there until it is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_matpo.megatron.model import PolicyModel
from megatron_matpo.megatron.parallel import ParallelState, data_group, expert_data_group

_KINDS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Shard:
    """What this rank's optimizer holds of one parameter."""

    start: int
    stop: int
    """Range of the flattened parameter; empty if other data-parallel ranks hold all of it."""
    tensors: dict[str, Tensor]
    """By kind, flat float32 [stop - start]."""


def members_of(optimizer: MegatronOptimizer) -> list[Any]:
    """The distributed optimizers behind a chained one: of dense parameters, then of experts.

    A stage without experts has the first only.
    """
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def describe(
    models: Sequence[PolicyModel],
    optimizer: MegatronOptimizer,
    model_states: Sequence[dict[str, Any]],
    state: ParallelState,
    is_loading: bool,
) -> dict[str, Any]:
    """Sharded optimizer state of this rank. Collective over the data-parallel ranks.

    Args:
        models: this rank's unwrapped chunks.
        optimizer: their optimizer.
        model_states: `sharded_state_dict()` of each.
        state: this rank's position.
        is_loading: give every rank room for its whole stage, instead of the first data-parallel
            rank the values.
    """
    members = members_of(optimizer)
    result: dict[str, Any] = {"step": _step(members)}
    for name, parameter, base in _bases(models, model_states):
        shard = _shard(members, parameter)
        group = expert_data_group() if ".experts." in name else data_group()
        for kind in _KINDS:
            if is_loading:
                full = torch.empty(parameter.shape, dtype=torch.float32)
            else:
                full = _collect(shard, kind, parameter, group, state.device)
                if dist.get_rank(group):
                    continue
            # Layers share a key and differ in their place along an axis; names are unique.
            changes: dict[str, Any] = {"key": f"optimizer.{kind}.{base.key}", "data": full}
            if isinstance(base, ShardedTensor):
                changes["dtype"] = full.dtype
            result[f"{kind} {name}"] = replace(base, **changes)
    return result


def restore(
    models: Sequence[PolicyModel],
    optimizer: MegatronOptimizer,
    model_states: Sequence[dict[str, Any]],
    loaded: dict[str, Any],
) -> None:
    """Take over what `describe(..., is_loading=True)` asked for. Nothing is communicated."""
    members = members_of(optimizer)
    for name, parameter, _ in _bases(models, model_states):
        shard = _shard(members, parameter)
        for kind, tensor in shard.tensors.items():
            full = loaded[f"{kind} {name}"]
            tensor.data.copy_(full.reshape(-1)[shard.start : shard.stop])
    _set_step(members, loaded["step"])


def _bases(
    models: Sequence[PolicyModel], model_states: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, Tensor, ShardedTensor | ShardedTensorFactory]]:
    """Trained parameters in the model's order: name, parameter, description for checkpoints."""
    for chunk, (model, model_state) in enumerate(zip(models, model_states, strict=True)):
        by_parameter = {
            id(base.data): base
            for base in model_state.values()
            if isinstance(base, ShardedTensor | ShardedTensorFactory)
        }
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # no optimizer holds a frozen one
                yield f"{chunk} {name}", parameter, by_parameter[id(parameter)]


def _shard(members: Sequence[Any], parameter: Tensor) -> _Shard:
    """This rank's shard of a parameter, as Megatron's distributed optimizer laid it out."""
    for member in members:
        if parameter in member.model_param_gbuf_map:
            owned = member._get_model_param_range_map(parameter)["param"]
            group, index = member.model_param_group_index_map[parameter]
            main = member.optimizer.param_groups[group]["params"][index]
            moments = member.optimizer.state[main]
            # An offloaded optimizer keeps its fp32 parameters beside the moments, on the host.
            fp32 = moments.get("master_param", main)
            tensors = {"param": fp32, **{kind: moments[kind] for kind in _KINDS[1:]}}
            return _Shard(owned.start, owned.end, tensors)
    return _Shard(0, 0, {})


def _collect(
    shard: _Shard, kind: str, parameter: Tensor, group: dist.ProcessGroup, device: torch.device
) -> Tensor:
    """The whole tensor on the host of the group's first rank; rubbish on the others."""
    full = torch.zeros(parameter.numel(), dtype=torch.float32, device=device)
    if kind in shard.tensors:
        full[shard.start : shard.stop] = shard.tensors[kind].detach().view(-1)
    if dist.get_world_size(group) > 1:
        # As integers: a float sum would turn -0.0 into 0.0.
        dist.reduce(full.view(torch.int32), dst=dist.get_global_rank(group, 0), group=group)
    return full.view(parameter.shape).cpu()


def _step(members: Sequence[Any]) -> int:
    """Updates made: torch counts per parameter, Transformer Engine's FusedAdam per group."""
    for member in members:
        for group in member.optimizer.param_groups:
            if "step" in group:
                return int(group["step"])
        for state in member.optimizer.state.values():
            if "step" in state:
                return int(state["step"])
    return 0


def _set_step(members: Sequence[Any], step: int) -> None:
    """The inverse of `_step`."""
    for member in members:
        counters = [s["step"] for s in member.optimizer.state.values() if "step" in s]
        for counter in counters:
            counter.fill_(float(step))
        if counters:
            continue
        for group in member.optimizer.param_groups:
            group["step"] = step
