"""A model folder for checks that never look at weights."""

from __future__ import annotations

import json
from pathlib import Path

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
    "rope_theta": 10000.0,
    "max_position_embeddings": 40960,
}


def write_model_folder(folder: Path) -> Path:
    """`QWEN3` as config.json, and empty files for the rest."""
    (folder / "config.json").write_text(json.dumps(QWEN3))
    for name in ("tokenizer.json", "model.safetensors"):
        (folder / name).touch()
    return folder
