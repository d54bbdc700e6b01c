"""Reading config.json: every field, every refusal, and which layouts a model allows.

Not proved here: that the accepted settings are computed right; `tests/dist/test_layouts.py` does.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_matpo.config.hf_families import MoeShape
from megatron_matpo.config.hf_model import HfModelConfig, check_layout, end_token_ids
from megatron_matpo.config.hf_rope import RopeScaling
from megatron_matpo.config.train import ParallelConfig
from megatron_matpo.errors import ConfigError

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 160,
    "vocab_size": 1021,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "eos_token_id": [7, 9],
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
}

LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def write(folder: Path, **changes: Any) -> Path:
    """A folder whose config.json is QWEN3 with changes; None removes a field."""
    raw = {key: value for key, value in {**QWEN3, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_all_fields(tmp_path):
    assert HfModelConfig.from_folder(write(tmp_path)) == HfModelConfig(
        folder=str(tmp_path),
        architecture="Qwen3ForCausalLM",
        hidden_size=64,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        ffn_size=160,
        vocab_size=1021,
        rope_theta=1e6,
        rms_eps=1e-6,
        tie_word_embeddings=True,
        max_positions=4096,
        qk_norm=True,
    )


def test_older_spellings(tmp_path):
    """Transformers 4 wrote rope_theta at the top and rope_scaling: null."""
    old = write(tmp_path, rope_parameters=None, rope_theta=5e5, eos_token_id=7, head_dim=None)
    hf = HfModelConfig.from_folder(old)
    assert (hf.rope_theta, hf.head_dim) == (5e5, 16)


def test_families_differ_in_what_a_layer_has(tmp_path):
    """Qwen2 ignores what Qwen3 calls attention_bias; Mistral's window has a default."""

    def read(**changes: Any) -> HfModelConfig:
        return HfModelConfig.from_folder(write(tmp_path, **changes))

    qwen2 = read(architectures=["Qwen2ForCausalLM"])
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.moe) == (True, False, None)
    llama = read(**LLAMA)
    assert (llama.qkv_bias, llama.qk_norm, llama.sliding_window) == (False, False, None)
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert read(**mistral).sliding_window == 4096
    assert read(**mistral, sliding_window=17).sliding_window == 17
    raw = {**QWEN3, **mistral, "sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert HfModelConfig.from_folder(tmp_path).sliding_window is None


def test_llama3_frequencies_in_both_spellings(tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    expected = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    new = {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 8192}
    hf = HfModelConfig.from_folder(write(tmp_path, **LLAMA, rope_parameters={**scaling, **new}))
    assert (hf.rope_scaling, hf.rope_theta) == (expected, 5e5)
    old = {**scaling, "type": "llama3", "original_max_position_embeddings": 8192}
    hf = HfModelConfig.from_folder(
        write(tmp_path, **LLAMA, rope_parameters=None, rope_theta=5e5, rope_scaling=old)
    )
    assert hf.rope_scaling == expected
    # Without the length of the pretraining it is the present one.
    hf = HfModelConfig.from_folder(
        write(tmp_path, rope_parameters={**scaling, "rope_type": "llama3", "rope_theta": 5e5})
    )
    assert hf.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 4096)


def test_which_layers_have_experts(tmp_path):
    hf = HfModelConfig.from_folder(write(tmp_path, **MOE, decoder_sparse_step=2))
    assert hf.moe == MoeShape(8, 2, 24, True, (False, True) * 3)
    assert [hf.is_moe_layer(i) for i in range(6)] == [False, True] * 3
    # transformers 5 writes the number of experts under another name.
    renamed = {**MOE, "num_experts": None, "num_local_experts": 8}
    hf = HfModelConfig.from_folder(write(tmp_path, **renamed, mlp_only_layers=[0, 5]))
    assert hf.moe is not None and hf.moe.layers == (False, True, True, True, True, False)
    dense = HfModelConfig.from_folder(write(tmp_path, **MOE, mlp_only_layers=list(range(6))))
    assert dense.moe is None and not dense.is_moe_layer(0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architectures=['GPT2LMHeadModel'] is not supported; supported: Qwen2ForCausalLM, "
            "Qwen3ForCausalLM, Qwen3MoeForCausalLM, LlamaForCausalLM, MistralForCausalLM",
        ),
        ({"architectures": None}, "architectures=[] is not supported"),
        ({"attention_bias": True}, "not supported: attention_bias=True (only False)"),
        ({"hidden_act": "gelu"}, "not supported: hidden_act='gelu' (only 'silu')"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
            "rope_type='yarn' (only default, linear, llama3)",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, "factor": 4.0}},
            "rope_type='llama3' without low_freq_factor, high_freq_factor",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 (only 1.0)"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config (only weights in"),
        ({**LLAMA, "mlp_bias": True}, "mlp_bias=True (only False)"),
        ({**LLAMA, "attention_bias": True}, "attention_bias=True (only False)"),
        ({**MOE, "norm_topk_prob": True, "num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ({**MOE, "num_experts": None}, "the field 'num_experts' is missing"),
        ({**MOE, "moe_intermediate_size": None}, "the field 'moe_intermediate_size' is missing"),
        ({"rope_parameters": None}, "neither rope_parameters.rope_theta nor rope_theta is set"),
        ({"hidden_size": None}, "the field 'hidden_size' is missing"),
        ({"vocab_size": None}, "the field 'vocab_size' is missing"),
    ],
)
def test_refusals(tmp_path, changes, expected):
    with pytest.raises(ConfigError) as caught:
        HfModelConfig.from_folder(write(tmp_path, **changes))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert expected in str(caught.value)


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path='/nowhere': no such folder"):
        HfModelConfig.from_folder("/nowhere")
    with pytest.raises(ConfigError, match=r"the folder has no config\.json"):
        HfModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        HfModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        HfModelConfig.from_folder(tmp_path)


@pytest.fixture
def hf(tmp_path: Path) -> HfModelConfig:
    folder = tmp_path / "tiny"
    folder.mkdir()
    return HfModelConfig.from_folder(write(folder))


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (2, 3), (3, 2), (6, 1)])
def test_layouts_that_fit(hf, tensor, pipeline, virtual):
    """Also with 4 ranks for 2 key/value heads."""
    layout = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual=virtual, data=3)
    assert check_layout(hf, layout) == []


def test_all_violations_are_reported_at_once(hf):
    assert check_layout(hf, ParallelConfig(tensor=3, pipeline=4, expert=2)) == [
        "parallel.tensor=3: does not divide 4 attention heads of tiny; allowed: 1, 2, 4",
        "parallel.tensor=3: does not divide 160 feed-forward channels of tiny; allowed: 1, 2, 4",
        "parallel.tensor=3: neither divides 2 key/value heads of tiny nor is a multiple of them; "
        "allowed: 1, 2, 4",
        "parallel.pipeline=4: does not divide 6 layers of tiny; allowed: 1, 2, 3, 6",
        "parallel.expert=2: tiny is dense; allowed: 1",
    ]
    assert check_layout(hf, ParallelConfig(tensor=0, data=-1)) == [
        "parallel.tensor=0: must be at least 1",
        "parallel.data=-1: must be at least 1",
    ]


def test_chunks_divide_the_layers_of_a_stage(hf):
    assert check_layout(hf, ParallelConfig(pipeline=2, virtual=2)) == [
        "parallel.virtual=2: does not divide the 3 layers of a pipeline stage of tiny; "
        "allowed: 1, 3"
    ]
    assert check_layout(hf, ParallelConfig(virtual=2)) == [
        "parallel.virtual=2: chunks per pipeline stage need parallel.pipeline of at least 2; use 1"
    ]


def test_windows_are_not_split_over_context_parallel_gpus(hf):
    """Transformer Engine lacks it; the CPU's own attention does not."""
    split, windowed = ParallelConfig(context=2), replace(hf, sliding_window=4096)
    assert check_layout(hf, split, on_gpu=True) == []
    assert check_layout(windowed, split) == []
    assert check_layout(windowed, ParallelConfig(tensor=2), on_gpu=True) == []
    (line,) = check_layout(windowed, split, on_gpu=True)
    assert line.startswith("parallel.context=2: tiny attends to a window of 4096 tokens")


def test_layouts_of_experts(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    hf = HfModelConfig.from_folder(write(folder, **MOE))
    for fits in (
        ParallelConfig(data=8, expert=8),
        ParallelConfig(tensor=2, data=2, expert=4, sequence=True),
        # No dense layer, so nothing that 160 channels would have to be divided for.
        ParallelConfig(tensor=4, sequence=True),
    ):
        assert check_layout(hf, fits) == []
    assert check_layout(hf, ParallelConfig(tensor=2, data=3, expert=3)) == [
        "parallel.expert=3: does not divide 8 experts of tiny; allowed: 1, 2, 4, 8",
        "parallel.sequence=false: tiny has experts, which with parallel.tensor=2 need the sequence "
        "split over the tensor-parallel ranks; use true",
    ]


def test_end_tokens_are_those_of_both_files(tmp_path: Path) -> None:
    assert end_token_ids(write(tmp_path, eos_token_id=[7, 9])) == (7, 9)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 11]}')
    assert end_token_ids(tmp_path) == (7, 9, 11)
    assert end_token_ids(write(tmp_path, eos_token_id=None)) == (9, 11)
    (tmp_path / "generation_config.json").write_text("[7]")
    with pytest.raises(ConfigError, match=r"generation_config\.json: not what Hugging Face writes"):
        end_token_ids(tmp_path)
