"""Gradients are plain sums; bad numbers stop an update; log-probs over a split vocabulary.

Proved: how a batch is cut into micro-batches, and over how many replicas it is spread, does not
matter; nothing moves when a loss or gradient is not finite; sharded log-probs, entropies and
gradients are those of the float64 formula, whatever the chunk size and the padding.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_matpo.config.train import ModelConfig
from megatron_matpo.megatron.batch import MicroBatch
from tests.helpers.dist import RankPool
from tests.helpers.megatron_ranks import (
    layout_error,
    non_finite_updates,
    only_grads,
    random_init,
    sharded_logprobs,
)
from tests.helpers.tiny import make_batch, make_tiny_model, tiny_config

pytestmark = pytest.mark.dist

BATCH = make_batch((8, 15), 5)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("update") / "model", tied=False)


@pytest.fixture(scope="module")
def whole_grads(ranks: RankPool, model_folder: Path) -> dict[str, torch.Tensor]:
    return ranks.run(only_grads, 1, tiny_config(model_folder), [BATCH])[0]


def cut(batch: MicroBatch, rows: int) -> list[MicroBatch]:
    """Micro-batches of `rows` sequences each."""
    names = [f.name for f in dataclasses.fields(batch) if torch.is_tensor(getattr(batch, f.name))]
    pieces = [getattr(batch, name).split(rows) for name in names]
    return [
        MicroBatch(**dict(zip(names, piece, strict=True))) for piece in zip(*pieces, strict=True)
    ]


@pytest.mark.parametrize("rows", [8, 4, 2, 3])
@pytest.mark.parametrize("dp", [1, 2])
def test_gradients_do_not_depend_on_the_cut(ranks: RankPool, model_folder, whole_grads, rows, dp):
    """3 rows make three micro-batches, so that one replica is evened out with an empty one."""
    config = tiny_config(model_folder, dp=dp)
    actual = ranks.run(only_grads, dp, config, cut(BATCH, rows))[0]
    for name, value in whole_grads.items():
        tolerance = 1e-5 * float(value.abs().max())
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
def test_bad_numbers_change_nothing(ranks: RankPool, model_folder, layout):
    config = tiny_config(model_folder, **layout)
    stories = ranks.run(non_finite_updates, 2, config, [BATCH, BATCH])
    original = load_file(model_folder / "model.safetensors")
    for story in stories:
        loss_error, grad_error = story["errors"]
        assert loss_error == "loss nan at update 0; nothing was changed"
        assert grad_error.startswith("gradient norm ")
        assert story["good"].loss == stories[0]["good"].loss
    for name, value in stories[0]["kept"].items():
        assert torch.equal(value, original[name]), name


@pytest.mark.parametrize("vocab_size", [8, 7, 3])
@pytest.mark.parametrize("tp", [1, 2])
def test_sharded_logprobs_are_the_formula(ranks: RankPool, model_folder, vocab_size, tp):
    """With 3 of 8 columns the second rank holds padding only."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 8, generator=generator) * 4
    labels = torch.randint(0, vocab_size, (2, 5), generator=generator)
    answers = ranks.run(
        sharded_logprobs, tp, tiny_config(model_folder, tp=tp), logits, labels, vocab_size
    )

    exact = logits.double()[..., :vocab_size].clone().requires_grad_()
    table = (exact / 0.7).log_softmax(-1)
    chosen = table.gather(-1, labels[..., None]).squeeze(-1)
    weights = torch.arange(1, 11, dtype=torch.float64).view(2, 5)
    (chosen * weights).sum().backward()
    entropy = -(table.exp() * table).sum(-1)
    grad = torch.zeros(2, 5, 8, dtype=torch.float64)
    grad[..., :vocab_size] = exact.grad

    for by_chunk in zip(*answers, strict=True):
        for answer in by_chunk:
            torch.testing.assert_close(answer["logprobs"].double(), chosen, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(answer["entropy"].double(), entropy, rtol=1e-6, atol=2e-6)
        whole = torch.cat([answer["grad"] for answer in by_chunk], dim=-1)
        torch.testing.assert_close(whole.double(), grad, rtol=1e-5, atol=2e-6)
    # Chunks only change the order of independent rows.
    for answer in answers:
        for chunked in answer[1:]:
            assert torch.equal(chunked["logprobs"], answer[0]["logprobs"])
            assert torch.equal(chunked["grad"], answer[0]["grad"])


def test_random_weights_do_not_depend_on_the_layout(ranks: RankPool, model_folder):
    model = ModelConfig(path=str(model_folder), random_init=True)
    single, split = (
        ranks.run(
            random_init,
            tp * pp,
            dataclasses.replace(tiny_config(model_folder, tp=tp, pp=pp), model=model),
        )[0]
        for tp, pp in ((1, 1), (2, 2))
    )
    assert single.keys() == split.keys()
    for name, value in single.items():
        assert torch.equal(split[name], value), name
        assert bool((value == 1).all()) if "norm" in name else 0.015 < float(value.std()) < 0.025


@pytest.mark.parametrize(
    ("layout", "world_size", "expected"),
    [
        ({"tp": 2}, 1, "= 2, but 1 trainer ranks were started"),
        (
            {"tp": 4},
            4,
            "parallel.tensor=4: does not divide 2 key/value heads of model; allowed: 1, 2",
        ),
        ({"pp": 3}, 3, "parallel.pipeline=3: does not divide 4 layers of model; allowed: 1, 2, 4"),
    ],
    ids=["world", "tensor", "pipeline"],
)
def test_impossible_layouts_are_refused(
    ranks: RankPool, model_folder, layout, world_size, expected
):
    for error in ranks.run(layout_error, world_size, tiny_config(model_folder, **layout)):
        assert expected in error
