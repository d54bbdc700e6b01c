"""Adapters in and out of a model: seeded initial values, and the folder that PEFT loads.

Names and shapes are PEFT's: `base_model.model.<layer>.lora_A.weight` [r, inputs] and
`base_model.model.<layer>.lora_B.weight` [outputs, r], where `<layer>` is the Hugging Face name of
the linear.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.lora import LoraConfig
from megatron_matpo.megatron.families import Sharding
from megatron_matpo.megatron.lora import Adapted, adapted_linears, adapters
from megatron_matpo.megatron.mapping import hf_tensors
from megatron_matpo.megatron.parallel import ParallelState, model_group
from megatron_matpo.obs.files import replace_folder


def peft_name(weight: str, matrix: str) -> str:
    """PEFT's name of `A` or `B` beside a Hugging Face weight."""
    return f"base_model.model.{weight.removesuffix('.weight')}.lora_{matrix}.weight"


@torch.no_grad()
def init_adapters(models: Sequence[Any], seed: int, state: ParallelState) -> None:
    """PEFT's initial values: A Kaiming-uniform with a = sqrt(5), B zero; so B A is 0.

    A depends on `seed` and the layer's name only, so every layout starts from the same adapter.
    Nothing is communicated.
    """
    for adapter in adapters(models):
        part = adapter.A.shape[1]
        inputs = part * state.tp_size if adapter.is_row else part
        start = part * state.tp_rank if adapter.is_row else 0
        stacked = [
            _kaiming(peft_name(target, "A"), (adapter.settings.rank, inputs), seed)
            for target in adapter.adapted.targets
        ]
        adapter.A.copy_(torch.cat(stacked)[:, start : start + part])
        adapter.B.zero_()


def _kaiming(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """`torch.nn.init.kaiming_uniform_(a=math.sqrt(5))`: uniform within 1 / sqrt(inputs)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def adapter_tensors(
    models: Sequence[Any], hf: HfModelConfig, lora: LoraConfig, state: ParallelState
) -> dict[str, Tensor]:
    """The whole adapter by PEFT's names, on the host of global rank 0; nothing elsewhere.

    Collective: every trainer rank calls. Travels linear by linear through `gather_object`: it is
    small beside the model, and written once per run.
    """
    if state.dp_rank or state.cp_rank:
        return {}
    mine = {adapter.adapted.rule.hf: adapter for adapter in adapters(models)}
    result: dict[str, Tensor] = {}
    for adapted in adapted_linears(hf, lora, state):
        part = None
        if adapted.rule.stage == state.pp_rank:
            adapter = mine[adapted.rule.hf]
            part = (adapter.A.detach().cpu(), adapter.B.detach().cpu())
        parts: list[Any] | None = None
        if state.is_logging_rank:
            parts = [None] * (state.tp_size * state.pp_size)
        dist.gather_object(part, parts, dst=0, group=model_group())
        if parts is not None:
            # Ranks of a stage are in tensor-parallel order.
            result |= _whole(adapted, [part for part in parts if part is not None], hf)
    return result


def _whole(
    adapted: Adapted, parts: Sequence[tuple[Tensor, Tensor]], hf: HfModelConfig
) -> dict[str, Tensor]:
    """All ranks' A and B of a linear -> one pair for each of its targets."""
    a_parts, b_parts = zip(*parts, strict=True)
    if adapted.rule.sharding is Sharding.ROW:
        (target,) = adapted.targets
        return {
            peft_name(target, "A"): torch.cat(a_parts, dim=1),
            peft_name(target, "B"): b_parts[0],
        }
    rows = hf_tensors(adapted.rule, b_parts, hf)
    result: dict[str, Tensor] = {}
    for target, a in zip(adapted.targets, a_parts[0].chunk(len(adapted.targets)), strict=True):
        result[peft_name(target, "A")] = a.clone()
        result[peft_name(target, "B")] = rows[target]
    return result


def save_adapter(
    models: Sequence[Any],
    hf: HfModelConfig,
    lora: LoraConfig,
    state: ParallelState,
    folder: str | Path,
) -> None:
    """Write the adapter as PEFT does. Collective; returns once the folder is in place.

    Only rank 0 writes: into `FOLDER.tmp`, flushed to disk, then renamed; an older one is replaced.
    """
    tensors = adapter_tensors(models, hf, lora, state)
    if state.is_logging_rank:
        target = Path(folder)
        temporary = target.with_name(target.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(_peft_config(hf, lora), indent=2)
        (temporary / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        replace_folder(temporary, target)
    dist.barrier()


def _peft_config(hf: HfModelConfig, lora: LoraConfig) -> dict[str, Any]:
    """The fields of PEFT's `LoraConfig` that give the tensors their meaning."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hf.folder,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
