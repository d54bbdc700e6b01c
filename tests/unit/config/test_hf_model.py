"""Reading config.json: every field, every refusal, and which layouts a model allows.

Not proved here: that the accepted settings are computed right; `tests/dist/test_layouts.py` does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_matpo.config.hf_model import HfModelConfig, check_layout
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
        eos_token_ids=(7, 9),
    )


def test_older_spellings(tmp_path):
    """Transformers 4 wrote rope_theta at the top and rope_scaling: null."""
    old = write(tmp_path, rope_parameters=None, rope_theta=5e5, eos_token_id=7, head_dim=None)
    hf = HfModelConfig.from_folder(old)
    assert (hf.rope_theta, hf.eos_token_ids, hf.head_dim) == (5e5, (7,), 16)
    assert HfModelConfig.from_folder(write(tmp_path, eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            "architectures=['LlamaForCausalLM'] is not supported; supported: Qwen3ForCausalLM",
        ),
        ({"architectures": None}, "architectures=[] is not supported"),
        ({"attention_bias": True}, "not supported: attention_bias=True (only False)"),
        ({"hidden_act": "gelu"}, "not supported: hidden_act='gelu' (only 'silu')"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
            "rope_type='yarn' (only 'default')",
        ),
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


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("pipeline", [1, 2, 3, 6])
def test_layouts_that_fit(hf, tensor, pipeline):
    assert check_layout(hf, ParallelConfig(tensor=tensor, pipeline=pipeline, data=3)) == []


def test_all_violations_are_reported_at_once(hf):
    assert check_layout(hf, ParallelConfig(tensor=3, pipeline=4, expert=2)) == [
        "parallel.tensor=3: does not divide 4 attention heads of tiny; allowed: 1, 2",
        "parallel.tensor=3: does not divide 2 key/value heads of tiny; allowed: 1, 2",
        "parallel.tensor=3: does not divide 160 feed-forward channels of tiny; allowed: 1, 2",
        "parallel.pipeline=4: does not divide 6 layers of tiny; allowed: 1, 2, 3, 6",
        "parallel.expert=2: tiny is dense; allowed: 1",
    ]
    assert check_layout(hf, ParallelConfig(tensor=0, data=-1)) == [
        "parallel.tensor=0: must be at least 1",
        "parallel.data=-1: must be at least 1",
    ]
