"""Checks of section `lora`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.lora import ALL, TARGETS
from megatron_matpo.config.root import Config


def check_lora(config: Config) -> Iterator[str]:
    """Violations that the configuration alone shows."""
    lora = config.lora
    for target in lora.targets:
        if target not in (*TARGETS, ALL):
            near = difflib.get_close_matches(target, TARGETS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            yield f"lora.targets={target}: {hint}expected {', '.join(TARGETS)} or {ALL}"
    if not lora.rank:
        return
    if not lora.targets:
        yield f"lora.targets=[]: lora.rank={lora.rank} has nothing to adapt; use [{ALL}]"
    if lora.alpha <= 0:
        yield f"lora.alpha={lora.alpha:g}: must be greater than 0; the adapters would do nothing"
    if config.model.random_init:
        yield (
            f"model.random_init=true: with lora.rank={lora.rank} the random weights would stay as "
            "they are; use lora.rank=0 or the folder's weights"
        )


def check_lora_model(config: Config, hf: HfModelConfig) -> Iterator[str]:
    """Violations that need the model's sizes."""
    lora = config.lora
    h, q = hf.hidden_size, hf.num_heads * hf.head_dim
    kv = hf.num_kv_heads * hf.head_dim
    smaller_side = {
        "q_proj": min(q, h),
        "k_proj": min(kv, h),
        "v_proj": min(kv, h),
        "o_proj": min(q, h),
        "gate_proj": min(hf.ffn_size, h),
        "up_proj": min(hf.ffn_size, h),
        "down_proj": min(hf.ffn_size, h),
    }
    for name in lora.layers:
        if lora.rank > smaller_side[name]:
            yield (
                f"lora.rank={lora.rank}: more than the smaller side of {name}, "
                f"{smaller_side[name]}; use at most that, or leave {name} out of lora.targets"
            )
