"""Full tensors by Hugging Face name on every rank, for engines that share the ranks' devices.

Every replica of the model collects its own: tensor-parallel ranks gather their shards, expert-
parallel ranks get the parameter from its holder, and the other pipeline stages get the result. No
collective spans two replicas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron.hf_io import own_memory, parameters_of
from megatron_matpo.megatron.lora import merged_weight
from megatron_matpo.megatron.mapping import Placed, hf_tensors, placed_rules
from megatron_matpo.megatron.parallel import (
    ParallelState,
    expert_group,
    pipeline_group,
    tensor_group,
)


def iter_everywhere(
    models: Sequence[Any],
    hf: HfModelConfig,
    state: ParallelState,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """What `hf_io.iter_hf_tensors` gives rank 0, in the same order, on all ranks.

    Collective: every rank iterates to the end, in step. A tensor belongs to the caller.
    """
    chunks = parameters_of(models)
    dtype = dtype or next(iter(chunks[0].values())).dtype
    for rule in placed_rules(hf, state.pp_size, state.vp_size, state.ep_size):
        if rule.is_copy:
            continue
        full: dict[str, Tensor] = {}
        if rule.stage == state.pp_rank:
            full = _on_stage(rule, chunks[rule.chunk], hf, state, dtype)
        if state.pp_size > 1:
            full = _on_all_stages(rule, full, state, dtype)
        yield from full.items()


def _on_stage(
    rule: Placed,
    parameters: dict[str, Tensor],
    hf: HfModelConfig,
    state: ParallelState,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """On all ranks of the stage that holds it."""
    parameter = merged_weight(rule.parameter(parameters)).detach()
    local = parameter.to(dtype).contiguous()
    shards = [local]
    if rule.expert_rank is not None:
        if state.ep_size > 1:
            # Names count from 0 inside a rank's experts: every rank has one of that name and shape.
            group = expert_group()
            shards = [local if state.ep_rank == rule.expert_rank else torch.empty_like(local)]
            source = dist.get_global_rank(group, rule.expert_rank)
            dist.broadcast(shards[0], src=source, group=group)
    elif state.tp_size > 1 and rule.sharding.is_split:
        shards = [torch.empty_like(local) for _ in range(state.tp_size)]
        dist.all_gather(shards, local, group=tensor_group())
    return own_memory(hf_tensors(rule, shards, hf), parameter)


def _on_all_stages(
    rule: Placed, full: dict[str, Tensor], state: ParallelState, dtype: torch.dtype
) -> dict[str, Tensor]:
    group = pipeline_group()
    source = dist.get_global_rank(group, rule.stage)
    result: dict[str, Tensor] = {}
    for name, shape in zip(rule.hf, rule.shapes, strict=True):
        is_source = state.pp_rank == rule.stage
        tensor = (
            full[name].contiguous()
            if is_source
            else torch.empty(shape, dtype=dtype, device=state.device)
        )
        dist.broadcast(tensor, src=source, group=group)
        result[name] = tensor
    return result
