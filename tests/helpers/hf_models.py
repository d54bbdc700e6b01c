"""Random tiny models of every supported family, written by transformers; and what it computes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from tests.helpers.tiny import VOCAB_SIZE

FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral")
NUM_LAYERS = 4


def random_config(family: str, seed: int) -> Any:
    """A configuration of transformers; every choice that the mapping depends on is drawn."""
    import transformers

    draw = random.Random(f"{family}/{seed}")
    heads = draw.choice((4, 8))
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": heads * draw.choice((4, 8)),
        "intermediate_size": draw.choice((24, 40, 48)),
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice((1, 2, 4)),
        "max_position_embeddings": 128,
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice((1e4, 5e5, 1e6))},
        "rms_norm_eps": draw.choice((1e-5, 1e-6)),
        "initializer_range": 0.1,
        "eos_token_id": 3,
        "pad_token_id": None,
        "bos_token_id": None,
    }
    head_dim = draw.choice((8, 16))
    match family:
        case "qwen2":
            return transformers.Qwen2Config(**common)
        case "qwen3":
            return transformers.Qwen3Config(**common, head_dim=head_dim)
        case "llama":
            common["rope_parameters"] = {
                "rope_type": "llama3",
                "rope_theta": draw.choice((100.0, 1e4)),
                "factor": draw.choice((4.0, 8.0, 32.0)),
                "low_freq_factor": draw.choice((1.0, 2.0)),
                "high_freq_factor": draw.choice((3.0, 4.0)),
                # Short, so that all three ranges of wavelengths occur within few channels.
                "original_max_position_embeddings": draw.choice((16, 64)),
            }
            return transformers.LlamaConfig(**common, head_dim=head_dim)
        case "mistral":
            # The batches are longer than the window.
            window = draw.choice((None, 3, 5))
            return transformers.MistralConfig(**common, head_dim=head_dim, sliding_window=window)
    sparse = draw.choice(({}, {"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}))
    return transformers.Qwen3MoeConfig(
        **common,
        **sparse,
        head_dim=head_dim,
        num_experts=draw.choice((4, 8)),
        num_experts_per_tok=draw.choice((2, 3)),
        moe_intermediate_size=draw.choice((12, 16)),
        norm_topk_prob=draw.random() < 0.5,
    )


def write_model(config: Any, folder: Path, seed: int = 0) -> Path:
    """A folder with random weights; norms and biases too, so that mix-ups show."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias") or name.endswith("gate.weight"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def split_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of the folder for what transformers stacks in memory: experts, gate over up."""
    result: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        prefix, _, kind = name.rpartition(".experts.")
        if not prefix:
            result[name] = value
            continue
        for expert, matrix in enumerate(value):
            if kind == "gate_up_proj":
                gate, up = matrix.chunk(2)
                result[f"{prefix}.experts.{expert}.gate_proj.weight"] = gate
                result[f"{prefix}.experts.{expert}.up_proj.weight"] = up
            else:
                result[f"{prefix}.experts.{expert}.down_proj.weight"] = matrix
    return result
