"""Proves the checks of section `lora`, and what `targets` means."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.lora import TARGETS, LoraConfig
from megatron_matpo.config.train import ModelConfig
from megatron_matpo.config.validate import collect_violations
from tests.helpers.model_folder import write_model_folder


@pytest.fixture
def problems(tmp_path):
    """What `matpo sft` says about a section `lora`."""
    write_model_folder(tmp_path)

    def ask(lora: LoraConfig, **model: bool) -> list[str]:
        config = replace(Config(), lora=lora, model=ModelConfig(path=str(tmp_path), **model))
        return collect_violations(config, command="sft")

    return ask


def test_targets_are_layers_in_one_order():
    assert LoraConfig().layers == ()
    assert LoraConfig(rank=4).layers == TARGETS
    assert LoraConfig(rank=4, targets=["up_proj", "q_proj"]).layers == ("q_proj", "up_proj")
    assert LoraConfig(rank=4, targets=["q_proj", "all"]).layers == TARGETS
    assert LoraConfig(rank=4, alpha=6.0).scale == 1.5


def test_good_settings_pass(problems):
    assert problems(LoraConfig()) == []
    assert problems(LoraConfig(rank=32)) == []
    # As wide as k_proj and v_proj are, but no target is that narrow.
    assert problems(LoraConfig(rank=64, targets=["q_proj", "o_proj", "down_proj"])) == []
    assert problems(LoraConfig(), random_init=True) == []


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        (LoraConfig(rank=-1), "lora.rank=-1: must be at least 0"),
        (LoraConfig(rank=4, alpha=0.0), "lora.alpha=0: must be greater than 0"),
        (LoraConfig(rank=4, targets=[]), "lora.targets=[]: lora.rank=4 has nothing to adapt"),
        (
            LoraConfig(rank=4, targets=["q_prj"]),
            "lora.targets=q_prj: did you mean q_proj? expected q_proj, k_proj",
        ),
        (
            LoraConfig(targets=["embed_tokens"]),
            "lora.targets=embed_tokens: expected q_proj, k_proj",
        ),
        (
            LoraConfig(rank=33, targets=["q_proj", "v_proj"]),
            "lora.rank=33: more than the smaller side of v_proj, 32",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_settings_are_named(problems, lora, expected):
    (line,) = problems(lora)
    assert line.startswith(expected)


def test_adapters_do_not_train_random_weights(problems):
    (line,) = problems(LoraConfig(rank=4), random_init=True)
    assert line.startswith("model.random_init=true: with lora.rank=4 the random weights would stay")
