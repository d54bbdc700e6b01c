"""Inverse frequencies of the rotary position embedding, as transformers computes them.

Megatron's `RotaryEmbedding(rope_scaling=True)` knows Llama 3's formula with the constants 1, 4 and
8192 only (`rotary_pos_embedding.py:95-101`); here they come from `config.json`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_matpo.config.hf_model import HfModelConfig


def inverse_frequencies(hf: HfModelConfig) -> Tensor:
    """Radians per position of each pair of channels, [d/2] float32 on the CPU.

    Source: transformers 5.12.1, `modeling_rope_utils.py`, in the same order of operations, so that
    the values are equal bit for bit.
    """
    steps = torch.arange(0, hf.head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / (hf.rope_theta ** (steps / hf.head_dim))
    scaling = hf.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    assert scaling.rope_type == "llama3", scaling
    context, low, high = (
        scaling.original_max_positions,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    wavelength = 2 * math.pi / frequencies
    is_long, is_short = wavelength > context / low, wavelength < context / high
    stretched = torch.where(is_long, frequencies / scaling.factor, frequencies)
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    return torch.where(~is_long & ~is_short, between, stretched)
