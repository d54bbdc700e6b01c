"""Adapters compute, differentiate, train and export what PEFT's do, in every layout.

Proved on gloo and in float32, with transformers and PEFT as oracle: log-probs and gradients of
every A and B with random non-zero adapters, with and without recompute; the same initial adapter,
gradient norms, and adapters after three updates in all layouts; merged weights; the exported
folders as PEFT and transformers load them; the base as reference model and bit for bit unchanged;
memory for gradients and moments of the adapters only. Layouts are tensor (with whole sequences and
with parts of them), pipeline (with chunks) and data parallelism. Not proved: bf16, and Transformer
Engine's fused norms.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_matpo.config import Config
from megatron_matpo.config.lora import TARGETS, LoraConfig
from megatron_matpo.config.train import ParallelConfig
from tests.helpers.checkpoint_ranks import restore_error, train_and_save
from tests.helpers.dist import RankPool
from tests.helpers.lora_ranks import learning_curve, lora_story
from tests.helpers.tiny import (
    make_batch,
    make_tiny_model,
    reference_grads,
    reference_logprobs,
    tiny_config,
)

pytestmark = pytest.mark.dist

BATCHES = [make_batch((3, 17), 0), make_batch((2, 9), 1)]
ALONE, SPLIT = ParallelConfig(), ParallelConfig(tensor=2, pipeline=2)
# All targets, and a part of each fused linear; tied embeddings are frozen on two stages.
SETTINGS = {
    "all": (LoraConfig(rank=3, alpha=5.0), False),
    "some": (LoraConfig(rank=2, alpha=8.0, targets=["v_proj", "q_proj", "up_proj"]), True),
}
LAYOUTS = {
    "all": (
        ALONE,
        SPLIT,
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(pipeline=2, virtual=2),
        ParallelConfig(data=2),
        ParallelConfig(tensor=2, data=2),
    ),
    "some": (ALONE, SPLIT),
}


def lora_config(folder: Path, lora: LoraConfig, **sizes: int) -> Config:
    return replace(tiny_config(folder, **sizes), lora=lora)


def peft_model(folder: Path, lora: LoraConfig, full: dict[str, Tensor] | None = None) -> Any:
    """Transformers' model with PEFT's adapters; `full` gives them values."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = list(lora.layers)
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
    model = peft.get_peft_model(base, settings)
    if full is not None:
        peft.set_peft_model_state_dict(model, full)
    return model


@pytest.fixture(scope="module", params=SETTINGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings, model folder, a random adapter with PEFT's names, and layouts."""
    lora, tied = SETTINGS[request.param]
    folder = make_tiny_model(tmp_path_factory.mktemp("lora") / "model", tied=tied)
    generator = torch.Generator().manual_seed(1)
    shapes = peft.get_peft_model_state_dict(peft_model(folder, lora))
    full = {
        name: torch.randn(value.shape, generator=generator) * 0.15 for name, value in shapes.items()
    }
    return lora, folder, full, LAYOUTS[request.param]


@pytest.fixture(scope="module")
def stories(case: Any, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict:
    lora, folder, full, layouts = case
    result = {}
    for layout in layouts:
        out = tmp_path_factory.mktemp("out")
        config = replace(lora_config(folder, lora), parallel=layout)
        result[layout] = ranks.run(lora_story, layout.world_size, config, BATCHES, full, out)
        result[layout][0]["out"] = out
    return result


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Same names; `tolerance` of each tensor's largest entry."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        error = float((actual[name] - value).abs().max())
        assert error <= tolerance * float(value.abs().max()), f"{name}: off by {error}"


def assert_scores(story: dict[str, Any], kind: str, expected: list, dp: int) -> None:
    for (actual, _), (want, _) in zip(story[kind], expected[story["dp_rank"] :: dp], strict=True):
        torch.testing.assert_close(actual.double(), want, rtol=1e-5, atol=1e-5)


def test_logprobs_are_those_of_peft(case, stories):
    lora, folder, full, _ = case
    base = reference_logprobs(folder, BATCHES)
    adapted = reference_logprobs(peft_model(folder, lora, full), BATCHES)
    assert float((base[0][0] - adapted[0][0]).abs().max()) > 0.1, "the adapter makes a difference"
    for layout, results in stories.items():
        for story in results:
            assert_scores(story, "before", base, layout.data)
            assert_scores(story, "scores", adapted, layout.data)
            assert_scores(story, "reference", base, layout.data)


def test_gradients_are_those_of_peft(case, stories):
    lora, folder, full, _ = case
    _, found = reference_grads(peft_model(folder, lora, full), BATCHES)
    expected = {name.replace(".default", ""): grad for name, grad in found.items()}
    assert set(expected) == set(full)
    for layout, results in stories.items():
        assert_close(results[0]["grads"], expected, 1e-5)
        if layout.data == 1:
            assert_close(results[0]["recomputed"], expected, 1e-5)


def test_the_initial_adapter_is_pefts_in_every_layout(case, stories):
    lora, folder, full, _ = case
    single = stories[ALONE][0]["initial"]
    for results in stories.values():
        for story in results[1:]:
            assert story["initial"] == {} and story["final"] == {}
        assert all(torch.equal(results[0]["initial"][name], single[name]) for name in full)
        assert all(torch.equal(results[0]["filled"][name], full[name]) for name in full)
    theirs = peft.get_peft_model_state_dict(peft_model(folder, lora))
    assert {n: v.shape for n, v in theirs.items()} == {n: v.shape for n, v in single.items()}
    for name, value in single.items():
        if "lora_B" in name:
            assert not value.any() and not theirs[name].any()
            continue
        bound = value.shape[1] ** -0.5
        for tensor in (value, theirs[name]):
            # A uniform distribution within `bound` has the deviation bound / sqrt(3).
            assert 0.8 * bound < float(tensor.abs().max()) <= bound
            assert float(tensor.std()) == pytest.approx(bound / 3**0.5, rel=0.25)
    values = [value for name, value in single.items() if "lora_A" in name]
    assert len({float(value[0, 0]) for value in values}) == len(values), "layers differ"


def test_updates_agree_with_the_single_process(stories):
    single = stories[ALONE][0]
    for story in (story for results in stories.values() for story in results):
        for actual, want in zip(story["updates"], single["updates"], strict=True):
            assert actual.loss == pytest.approx(want.loss, rel=1e-5, abs=1e-6)
            assert actual.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)
            assert actual.metrics == pytest.approx(want.metrics, rel=1e-5)
    for results in stories.values():
        assert_close(results[0]["final"], single["final"], 1e-5)
    assert all(not torch.equal(single["final"][n], v) for n, v in single["filled"].items())


def test_the_gradient_norm_counts_every_parameter_once(stories):
    for layout, results in stories.items():
        norm = sum(float(g.double().square().sum()) for g in results[0]["grads"].values()) ** 0.5
        assert results[0]["updates"][0].grad_norm == pytest.approx(norm, rel=1e-5), layout


def test_only_adapters_are_trained_and_take_memory(case, stories):
    lora, _, full, _ = case
    for layout, results in stories.items():
        assert all(story["base kept"] for story in results)
        sizes = results[0]["sizes"]
        if layout == ALONE:
            # Rows of a fused weight that belong to no target: k_proj and gate_proj of 4 layers.
            unused = 4 * (32 + 48) * lora.rank if len(lora.layers) < len(TARGETS) else 0
            assert sizes["trained"] == sum(value.numel() for value in full.values()) + unused
        if layout.data == 1:
            assert sizes["optimizer"] == 8 * sizes["trained"], "two moments in fp32"
        # Megatron starts each parameter at a multiple of 64 and pads the end.
        assert sizes["gradients"] < 4 * (sizes["trained"] + 64 * len(full) + 128)
        assert sizes["trained"] < 0.3 * sizes["all"]


def test_merged_weights_are_those_of_peft(case, stories):
    lora, folder, full, _ = case
    merged = peft_model(folder, lora, full).merge_and_unload().state_dict()
    for results in stories.values():
        assert_close(results[0]["merged"], {n: merged[n] for n in results[0]["merged"]}, 1e-6)


def test_exported_folders_are_loaded_by_peft_and_transformers(case, stories):
    lora, folder, *_ = case
    for layout in (ALONE, SPLIT):
        story = stories[layout][0]
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, story["out"] / "adapter")
        assert set(theirs.peft_config["default"].target_modules) == set(lora.layers)
        assert_scores(story, "last scores", reference_logprobs(theirs, BATCHES), 1)
        assert_scores(story, "last scores", reference_logprobs(story["out"] / "hf", BATCHES), 1)
        files = sorted(path.name for path in story["out"].rglob("adapter*"))
        assert files == ["adapter", "adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("lora") / "model", tied=True)


def test_a_resumed_run_continues_bit_for_bit(ranks: RankPool, folder: Path, tmp_path: Path):
    config = lora_config(folder, SETTINGS["all"][0], tp=2, pp=2)
    whole = ranks.run(train_and_save, 4, config, BATCHES, tmp_path / "whole", 4)
    ranks.run(train_and_save, 4, config, BATCHES, tmp_path / "parts", 2)
    parts = ranks.run(train_and_save, 4, config, BATCHES, tmp_path / "parts", 4)
    for one, other in zip(whole, parts, strict=True):
        assert other["extra"] == {"updates": 2}
        assert other["results"] == one["results"][2:]
        assert one["weights"].keys() == other["weights"].keys()
        assert all(torch.equal(one["weights"][n], other["weights"][n]) for n in one["weights"])


def test_checkpoints_fit_other_layouts_and_no_other_adapter(
    ranks: RankPool, folder: Path, tmp_path: Path
):
    lora = LoraConfig(rank=3, alpha=5.0, targets=["q_proj", "o_proj", "gate_proj", "up_proj"])
    config = lora_config(folder, lora, tp=2, pp=2)
    saved = ranks.run(train_and_save, 4, config, BATCHES, tmp_path, 3)[0]
    single = ranks.run(train_and_save, 1, lora_config(folder, lora), BATCHES, tmp_path, 3)[0]
    assert single["extra"] == {"updates": 3} and single["results"] == []
    # Parts of B A are summed in another order when o_proj is whole.
    assert_close(single["weights"], saved["weights"], 1e-6)
    split = ranks.run(train_and_save, 2, lora_config(folder, lora, tp=2), BATCHES, tmp_path, 4)
    assert split[0]["results"][0].grad_norm == split[1]["results"][0].grad_norm
    further = ranks.run(train_and_save, 1, lora_config(folder, lora), BATCHES, tmp_path / "b", 4)
    assert split[0]["results"][0].loss == pytest.approx(further[0]["results"][3].loss, rel=1e-5)
    for other in (LoraConfig(), replace(lora, rank=2), replace(lora, targets=list(TARGETS))):
        (error,) = ranks.run(restore_error, 1, lora_config(folder, other), tmp_path)
        assert "is of another model" in error
        assert "'lora': {'rank': 3, 'alpha': 5.0, 'targets': ['q_proj', 'o_proj'" in error


def test_adapters_learn(ranks: RankPool, folder: Path):
    """A batch of random tokens by heart."""
    config = lora_config(folder, LoraConfig(rank=8), tp=2)
    config = replace(config, optim=replace(config.optim, lr=1e-2, eps=1e-8, clip_grad=1.0))
    losses = ranks.run(learning_curve, 2, config, BATCHES[:1], 25)[0]
    assert losses[0] > 4.5 and losses[10] < 0.7 * losses[0] and losses[-1] < 0.5 * losses[0]
