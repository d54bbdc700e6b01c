"""Inverse frequencies equal transformers' bit for bit, whatever the constants in config.json."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron.rope import inverse_frequencies

SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    # Llama 3.1, Llama 3.2, and constants that Megatron's own implementation does not take.
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 2.0, "high_freq_factor": 7.0,
     "original_max_position_embeddings": 333},
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_equal_to_those_of_transformers(tmp_path: Path, scaling: dict[str, object], theta: float):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=8,
        num_hidden_layers=1,
        vocab_size=7,
        head_dim=128,
        rope_parameters={**scaling, "rope_theta": theta},
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    expected = LlamaForCausalLM(config).model.rotary_emb.inv_freq
    assert expected.unique().numel() == 64
    assert torch.equal(inverse_frequencies(HfModelConfig.from_folder(tmp_path)), expected)
