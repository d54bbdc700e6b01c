"""The model families that the trainer knows, by architecture name. Torch-free.

A family says which parts a decoder layer has; sizes come from `config.json`. What a setting would
change and the trainer does not implement is listed here with its only accepted value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MISTRAL_WINDOW = 4096
"""What transformers takes where a Mistral's config.json does not name `sliding_window`."""


@dataclass(frozen=True)
class Family:
    """What all models of one architecture have in common."""

    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    qk_norm: bool = False
    """RMS norms over each query and key head."""
    is_moe: bool = False
    has_sliding_window: bool = False
    """All layers attend to the last `sliding_window` tokens unless that is null."""
    only: Mapping[str, object] = field(default_factory=dict[str, object])
    """Settings and the one value of each that is implemented, which is also the default."""


_NO_WINDOW = {"use_sliding_window": False}

FAMILIES: dict[str, Family] = {
    "Qwen2ForCausalLM": Family(qkv_bias=True, only=_NO_WINDOW),
    "Qwen3ForCausalLM": Family(qk_norm=True, only={"attention_bias": False, **_NO_WINDOW}),
    "Qwen3MoeForCausalLM": Family(
        qk_norm=True, is_moe=True, only={"attention_bias": False, **_NO_WINDOW}
    ),
    "LlamaForCausalLM": Family(only={"attention_bias": False, "mlp_bias": False}),
    "MistralForCausalLM": Family(has_sliding_window=True),
}
SUPPORTED_ARCHITECTURES = tuple(FAMILIES)


@dataclass(frozen=True)
class MoeShape:
    """Mixture-of-experts layers: softmax router, top-k, no shared experts."""

    num_experts: int
    experts_per_token: int
    ffn_size: int
    """Of one expert."""
    normalize: bool
    """The weights of a token's experts are divided by their sum."""
    layers: tuple[bool, ...]
    """Per layer, whether it has experts; the others are dense."""


def family_problems(family: Family, raw: dict[str, Any]) -> list[str]:
    """Settings that would be trained as something else; one line each."""
    expected = {"hidden_act": "silu", **family.only}
    problems = [
        f"{key}={raw[key]!r} (only {want!r})"
        for key, want in expected.items()
        if raw.get(key, want) != want
    ]
    kinds: list[str] = raw.get("layer_types") or []
    if any(kind != "full_attention" for kind in kinds):
        problems.append(f"layer_types={sorted(set(kinds))} (only 'full_attention')")
    if raw.get("quantization_config"):
        problems.append("quantization_config (only weights in bf16, fp16 or fp32)")
    if family.is_moe and raw.get("norm_topk_prob") and raw.get("num_experts_per_tok") == 1:
        problems.append(
            "norm_topk_prob=True with num_experts_per_tok=1 (a router without gradient)"
        )
    return problems


def read_window(family: Family, raw: dict[str, Any]) -> int | None:
    """Tokens that a token attends to, itself included; None for all before it."""
    if not family.has_sliding_window:
        return None
    window = raw.get("sliding_window", _MISTRAL_WINDOW)
    return None if window is None else int(window)


def num_experts(raw: dict[str, Any]) -> int | None:
    """The hub's `num_experts`, which transformers 5 writes as `num_local_experts`."""
    value = raw.get("num_experts", raw.get("num_local_experts"))
    return None if value is None else int(value)


def read_moe(raw: dict[str, Any]) -> MoeShape | None:
    """Experts of a family that has them; None if every layer turns out to be dense.

    Raises:
        KeyError: a field is missing.
    """
    count = num_experts(raw) or 0
    step = int(raw.get("decoder_sparse_step", 1))
    dense: list[int] = raw.get("mlp_only_layers") or []
    layers = tuple(
        count > 0 and i not in dense and (i + 1) % step == 0
        for i in range(int(raw["num_hidden_layers"]))
    )
    if not any(layers):
        return None
    return MoeShape(
        num_experts=count,
        experts_per_token=int(raw["num_experts_per_tok"]),
        ffn_size=int(raw["moe_intermediate_size"]),
        normalize=bool(raw.get("norm_topk_prob", False)),
        layers=layers,
    )
