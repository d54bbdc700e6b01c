"""Which linears get adapters, which rows of a fused weight are whose, and the merge's formula."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.lora import LoraConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.megatron import lora
from megatron_matpo.megatron.parallel import ParallelState

MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "intermediate_size": 6,
    "vocab_size": 5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
}


@pytest.fixture
def hf(tmp_path: Path) -> HfModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return HfModelConfig.from_folder(tmp_path)


def test_every_layer_has_its_linears_in_export_order(hf):
    found = lora.adapted_linears(hf, LoraConfig(rank=1, targets=["v_proj", "q_proj", "down_proj"]))
    assert [adapted.targets for adapted in found] == [
        targets
        for i in range(2)
        for targets in (
            (
                f"model.layers.{i}.self_attn.q_proj.weight",
                f"model.layers.{i}.self_attn.v_proj.weight",
            ),
            (f"model.layers.{i}.mlp.down_proj.weight",),
        )
    ]
    assert lora.adapted_linears(hf, LoraConfig()) == []


def state(tp_rank: int, tp_size: int) -> ParallelState:
    """Of one tensor-parallel rank."""
    return ParallelState(
        rank=tp_rank,
        world_size=tp_size,
        tp_rank=tp_rank,
        tp_size=tp_size,
        pp_rank=0,
        pp_size=1,
        dp_rank=0,
        dp_size=1,
        cp_rank=0,
        cp_size=1,
        device=torch.device("cpu"),
    )


def test_owners_follow_the_rows_of_a_fused_weight(hf):
    """A kv group is 4 rows of queries, 2 of key, 2 of value; gate and up are halves."""
    settings = LoraConfig(rank=1, targets=["q_proj", "v_proj", "up_proj"])
    group = [[1, 0]] * 4 + [[0, 0]] * 2 + [[0, 1]] * 2
    for tp_size, tp_rank in ((1, 0), (2, 0), (2, 1)):
        qkv, fc1 = lora.adapted_linears(hf, settings, state(tp_rank, tp_size))[:2]
        assert qkv.owner is not None and fc1.owner is not None
        assert qkv.owner.tolist() == group * (2 // tp_size)
        half = 6 // tp_size
        assert fc1.owner.tolist() == [[0]] * half + [[1]] * half


def test_merging_is_the_formula(hf):
    """Of two targets and of one; the operands stay as they are, in their own dtype."""
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((8, 5), (6, 5), (8, 3)))
    kept = weight.bfloat16()
    owner = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 0.0]] * 2 + [[0.0, 1.0]] * 2)
    merged = lora.merge(kept, a, b, owner, 0.5)
    want = kept.double()
    want[:4] += 0.5 * b[:4].double() @ a[:3].double()
    want[6:] += 0.5 * b[6:].double() @ a[3:].double()
    assert merged.dtype is torch.float32
    torch.testing.assert_close(merged.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(kept, weight.bfloat16())
    torch.testing.assert_close(
        lora.merge(weight, a[:3], b, None, 2.0), weight + 2 * b @ a[:3], rtol=1e-6, atol=1e-6
    )


def test_experts_are_refused(hf, monkeypatch):
    rules = list(lora.placed_rules(hf, 1))

    def with_experts(*_):
        for rule in rules:
            names = tuple(name.replace(".mlp.", ".mlp.experts.0.") for name in rule.hf)
            yield replace(rule, hf=names)

    monkeypatch.setattr(lora, "placed_rules", with_experts)
    with pytest.raises(ConfigError, match="gate_proj of this model are experts"):
        lora.adapted_linears(hf, LoraConfig(rank=1))
    assert len(lora.adapted_linears(hf, LoraConfig(rank=1, targets=["q_proj", "o_proj"]))) == 4
