"""What a rank of a layout really allocates, for comparison with the plan."""

from __future__ import annotations

from typing import Any

import torch

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron.actor import MegatronActor
from tests.helpers.dist import RankInfo
from tests.helpers.megatron_ranks import layout


def allocated(info: RankInfo, config: Config) -> dict[str, int]:
    """Bytes of parameters, flat buffers and optimizer tensors of this rank."""
    with layout(info, config) as state:
        actor = MegatronActor(config, HfModelConfig.from_folder(config.model.path), state)
        buffers = [
            buffer
            for model in actor._models
            for buffer in (*model.buffers, *model.expert_parallel_buffers)
        ]
        parameters = [p for model in actor._models for p in model.parameters()]
        frozen = sum(p.nbytes for p in parameters if not p.requires_grad)
        flat = {buffer.param_data.untyped_storage().data_ptr() for buffer in buffers}
        return {
            "stage": state.pp_rank,
            "numel": sum(p.numel() for p in parameters),
            "parameters_elsewhere": sum(
                p.untyped_storage().data_ptr() not in flat for p in parameters if p.requires_grad
            ),
            "weights": frozen
            + sum(buffer.param_data.untyped_storage().nbytes() for buffer in buffers),
            "gradients": sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers),
            "optimizer": _optimizer_bytes(actor._optimizer, flat),
        }


def _optimizer_bytes(optimizer: Any, model_storages: set[int]) -> int:
    """fp32 parameters and moments that are not views of the model's own buffers."""
    storages: dict[int, int] = {}
    for member in optimizer.chained_optimizers:
        for group in member.optimizer.param_groups:
            for parameter in group["params"]:
                state = member.optimizer.state[parameter].values()
                for tensor in (parameter, *(t for t in state if torch.is_tensor(t) and t.dim())):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for address, size in storages.items() if address not in model_storages)
