"""Proves the operation counts against torch's own counter on a model of transformers, exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_matpo.config.flops import Shape, forward_flops, training_flops
from megatron_matpo.config.hf_model import HfModelConfig
from tests.helpers.tiny import make_tiny_model

LENGTH = 24


def counted(model, folder: Path, shape: Shape, *, with_backward: bool) -> int:
    """What torch counts for one sequence, without what the formula leaves out on purpose."""
    ids = torch.arange(LENGTH)[None]
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids).logits
        if with_backward:
            logits.sum().backward()
    passes = 3 if with_backward else 1
    # The model multiplies the whole square; the tables of rotary angles are a product too.
    wasted = shape.per_pair * (LENGTH**2 - LENGTH * (LENGTH + 1) // 2)
    angles = HfModelConfig.from_folder(folder).head_dim * LENGTH
    return counter.get_total_flops() - passes * wasted - angles


def test_dense_counts_are_torchs(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path / "model", tied=False)
    shape = Shape.of(HfModelConfig.from_folder(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    lengths, trained = [LENGTH], LENGTH
    assert forward_flops(shape, lengths, trained) == counted(
        model, folder, shape, with_backward=False
    )
    assert training_flops(shape, lengths, trained) == counted(
        model, folder, shape, with_backward=True
    )


def test_sequences_add_up_and_only_trained_tokens_have_logits():
    shape = Shape(2, 8, 16, 4, 24, 101)
    assert forward_flops(shape, [5, 7], 3) == sum(
        forward_flops(shape, [length], trained) for length, trained in ((5, 1), (7, 2))
    )
    assert forward_flops(shape, [5], 4) - forward_flops(shape, [5], 1) == 3 * 2 * 8 * 101


def test_experts_count_as_often_as_a_token_sees_them():
    """Two of four layers have experts: 3 of 10 for each token, and a shared one."""
    dense = Shape(4, 8, 16, 4, 24, 101)
    mixed = Shape(4, 8, 16, 4, 24, 101, 2, 10, 3, 6, 5)
    feed_forward = 3 * 2 * 8 * (3 * 6 + 5) + 2 * 8 * 10
    assert mixed.per_token - dense.per_token == 2 * (feed_forward - 3 * 2 * 8 * 24)


def test_a_14b_model_is_about_six_operations_per_parameter_and_token():
    shape = Shape(40, 5120, 5120, 1024, 17408, 151936)  # Qwen3-14B
    parameters = 14.77e9 - 151936 * 5120  # the embedding multiplies nothing
    assert training_flops(shape, [1], 1) == pytest.approx(6 * parameters, rel=2e-3)
