"""Every layout computes what transformers computes, and trains to the same weights.

Proved here, on gloo and in float32, for tied and untied embeddings and a vocabulary that tensor
parallelism has to pad: log-probs, entropies and gradients against transformers; losses, gradient
norms, metrics and weights after three updates against the single process; bit-exact round trips of
the weights. Not proved: bf16, NCCL, Transformer Engine.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.dist import RankPool
from tests.helpers.megatron_ranks import whole_story
from tests.helpers.tiny import (
    make_batch,
    make_tiny_model,
    reference_grads,
    reference_logprobs,
    tiny_config,
)

pytestmark = pytest.mark.dist

# Four micro-batches of so many samples of at most so many tokens; dp=2 gives each replica two.
BATCHES = [
    make_batch((3, 17), 0),
    make_batch((2, 9), 1),
    make_batch((4, 12), 2),
    make_batch((1, 23), 3),
]
# (tp, pp, cp, dp); the first is the one that the others are compared with.
LAYOUTS = [
    *((1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 2), (2, 2, 1, 1), (2, 1, 1, 2)),
    *((1, 1, 2, 1), (1, 2, 2, 1)),
]


@pytest.fixture(scope="session", params=["untied", "tied"])
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return make_tiny_model(folder, tied=request.param == "tied")


@pytest.fixture(scope="session")
def stories(
    model_folder: Path, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, ...], list[dict[str, Any]]]:
    result = {}
    for layout in LAYOUTS:
        config = tiny_config(
            model_folder, **dict(zip(("tp", "pp", "cp", "dp"), layout, strict=True))
        )
        saved = tmp_path_factory.mktemp("saved") / "hf"
        result[layout] = ranks.run(whole_story, math.prod(layout), config, BATCHES, saved)
    return result


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names in the same order; 1e-5 of each tensor's largest entry."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=1e-5,
            atol=1e-5 * float(value.abs().max()),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_and_entropies_are_those_of_transformers(stories, model_folder, layout):
    expected = reference_logprobs(model_folder, BATCHES)
    for story in stories[layout]:
        for (logprobs, entropy), (want, want_entropy) in zip(
            story["scores"], expected[story["dp_rank"] :: layout[3]], strict=True
        ):
            torch.testing.assert_close(logprobs.double(), want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(entropy.double(), want_entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_transformers(stories, model_folder, layout):
    _, expected = reference_grads(model_folder, BATCHES)
    assert_close(
        stories[layout][0]["grads"], {name: expected[name] for name in stories[layout][0]["grads"]}
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_survive_the_round_trip_bit_for_bit(stories, model_folder, layout):
    original = load_file(model_folder / "model.safetensors")
    exported = stories[layout][0]["initial"]
    assert set(exported) == set(original)
    for name, value in original.items():
        assert torch.equal(exported[name], value), name
    saved = stories[layout][0]["saved"]
    for name, value in stories[layout][0]["final"].items():
        assert torch.equal(saved[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_updates_agree_with_the_single_process(stories, layout):
    expected = stories[LAYOUTS[0]][0]["updates"]
    for story in stories[layout]:
        for actual, want in zip(story["updates"], expected, strict=True):
            assert actual.loss == pytest.approx(want.loss, rel=1e-5, abs=1e-6)
            assert actual.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)
            assert actual.lr == want.lr
            assert actual.metrics == pytest.approx(want.metrics, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_three_updates_lead_to_the_same_weights(stories, layout):
    assert_close(stories[layout][0]["final"], stories[LAYOUTS[0]][0]["final"])


def test_updates_did_something(stories):
    single = stories[LAYOUTS[0]][0]
    moved = [
        name
        for name, value in single["final"].items()
        if not torch.equal(value, single["initial"][name])
    ]
    assert moved == list(single["final"])
    assert [update.lr for update in single["updates"]] == [0.0005, 0.001, 0.001]
    assert single["updates"][0].metrics["tokens"] == sum(float(b.loss_mask.sum()) for b in BATCHES)
    assert single["updates"][0].metrics["largest/max"] == max(
        float((b.labels * b.loss_mask).max()) for b in BATCHES
    )
    # The norm is above `optim.clip_grad`, so that clipping is part of what is compared.
    assert single["updates"][0].grad_norm > 0.5


def test_only_rank_0_receives_tensors(stories):
    for layout, results in stories.items():
        for rank, story in enumerate(results):
            assert bool(story["initial"]) == (rank == 0), layout
