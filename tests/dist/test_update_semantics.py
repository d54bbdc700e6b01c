"""Gradients are plain sums; bad numbers stop an update; log-probs over a split vocabulary.

Proved: which samples share a micro-batch, and over how many replicas they are spread, does not
matter: losses and gradients are those of transformers for each sample alone; losses, gradient
norms and metrics of whole learner steps, with every term of the loss and every aggregation, are the
same in every layout; nothing moves when a loss or gradient is not
finite; sharded log-probs, entropies and gradients are those of the float64 formula, whatever the
chunk size and the padding.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_matpo.config import Config
from megatron_matpo.config.train import ModelConfig
from tests.helpers.dist import RankPool
from tests.helpers.episodes import make_batch as make_episodes
from tests.helpers.learner_ranks import for_tiny_model, learned, with_algo
from tests.helpers.megatron_ranks import (
    layout_error,
    loss_and_grads,
    non_finite_updates,
    random_init,
    sharded_logprobs,
)
from tests.helpers.tiny import (
    make_batch,
    make_tiny_model,
    packed,
    reference_grads,
    tiny_config,
    unpacked,
)

pytestmark = pytest.mark.dist

BATCH = make_batch((8, 15), 5)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("update") / "model", tied=False)


@pytest.fixture(scope="module")
def from_transformers(model_folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    return reference_grads(model_folder, [BATCH])


# Which samples share a micro-batch: one after another, and mixed up.
PACKINGS = {
    "one": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "pairs": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "three": [[7, 0, 3], [5], [6, 1, 4, 2]],
    "alone": [[i] for i in range(8)],
}


@pytest.mark.parametrize(
    ("packing", "layout"),
    [
        *((packing, layout) for packing in PACKINGS for layout in ({}, {"dp": 2}, {"cp": 2})),
        *(("three", layout) for layout in ({"tp": 2}, {"pp": 2})),
        *(("three", {"cp": 2, size: 2}) for size in ("tp", "pp", "dp")),
        ("one", {"cp": 4}),
    ],
    ids=str,
)
def test_neither_packing_nor_layout_matters(
    ranks, model_folder, from_transformers, packing, layout
):
    """Loss and gradients are those of transformers, each sample alone.

    With three micro-batches one of two replicas is evened out with an empty one; with tensor
    parallelism the row, and with context parallelism every sample, is padded.
    """
    samples = unpacked(BATCH)
    batches = [packed([samples[i] for i in group]) for group in PACKINGS[packing]]
    world_size = math.prod(layout.values())
    config = tiny_config(model_folder, **layout)
    answers = ranks.run(loss_and_grads, world_size, config, batches)
    loss, grads = from_transformers
    largest = max(float(value.abs().max()) for value in grads.values())
    for actual, _ in answers:
        assert actual == pytest.approx(loss, rel=1e-6)
    assert answers[0][1].keys() == grads.keys()
    for name, value in grads.items():
        assert float((answers[0][1][name] - value).abs().max()) < 1e-5 * largest, name


def learner_configs(folder: Path, **layout: int) -> list[Config]:
    """Every term of the loss with every aggregation, several updates; and the original's way."""
    base = tiny_config(folder, micro_batch_tokens=100, **layout)
    common = {"kl_coef": 5.0, "tis_cap": 1.5, "normalize_std": False}
    return [
        with_algo(base, **common, tis="truncate", updates_per_step=2),
        with_algo(base, **common, tis="mask", aggregation="trajectory", kl_estimator="k2"),
        with_algo(base, **common, tis="truncate", aggregation="episode", updates_per_step=2),
        dataclasses.replace(with_algo(base, **common), compat="reference"),
    ]


EPISODES = [for_tiny_model(make_episodes(seed, num_groups=3)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def learned_alone(ranks: RankPool, model_folder: Path) -> list[list[dict[str, float]]]:
    return ranks.run(learned, 1, learner_configs(model_folder), EPISODES)[0]


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"cp": 2}, {"dp": 2}], ids=str)
def test_a_learner_step_does_not_depend_on_the_layout(
    ranks: RankPool, model_folder, learned_alone, layout
):
    """The second step starts from what the first made, so its updates are compared too."""
    for of_rank in ranks.run(learned, 2, learner_configs(model_folder, **layout), EPISODES):
        for steps, expected in zip(of_rank, learned_alone, strict=True):
            for actual, want in zip(steps, expected, strict=True):
                # How full the micro-batches are is the one thing that may depend on the layout.
                packing = {"train/packing_efficiency": actual["train/packing_efficiency"]}
                assert actual == pytest.approx({**want, **packing}, rel=1e-5, abs=1e-6)


def test_the_compared_steps_use_every_term(learned_alone):
    truncate, mask, episode, reference = learned_alone
    assert [steps[0]["updates"] for steps in (truncate, mask, episode)] == [2, 1, 2]
    assert reference[0]["updates"] > 2
    for steps in (truncate, mask, episode):
        assert steps[1]["loss/kl"] > 5e-4 and abs(steps[1]["loss/policy"]) > 1e-4
        assert 0 < steps[1]["policy/tis_held_back/worker"] < 1
    norms = [steps[1]["optim/grad_norm"] for steps in learned_alone]
    assert len({round(norm, 4) for norm in norms}) == len(norms), "settings make a difference"


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
def test_bad_numbers_change_nothing(ranks: RankPool, model_folder, layout):
    """And are found where they are: by token, or where only weights overflow, by micro-batch."""
    config = tiny_config(model_folder, **layout)
    batches = [BATCH, make_batch((2, 9), 6)]
    stories = ranks.run(non_finite_updates, 2, config, batches)
    original = load_file(model_folder / "model.safetensors")
    everything = {f"5/{row}" for row in range(8)} | {"6/0", "6/1"}
    for story in stories:
        loss, grad, overflow = story["refused"]
        assert loss[0].startswith("loss nan at update 0; nothing was changed; not finite in traj")
        assert loss[1] == dict.fromkeys(sorted(everything), ("gradient",))
        assert grad[0].startswith("gradient norm ") and grad[1] == loss[1]
        assert overflow[0].startswith("gradient norm ")
        assert overflow[1] == {"6/0": ("weight_gradient",), "6/1": ("weight_gradient",)}
        assert story["good"].loss == stories[0]["good"].loss
    for name, value in stories[0]["kept"].items():
        assert torch.equal(value, original[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tp", "vocab_size"), [(1, 8), (2, 7), (2, 3), (4, 7), (4, 3)])
def test_sharded_logprobs_are_the_formula(ranks: RankPool, model_folder, vocab_size, tp, dtype):
    """With 3 of 8 rows the last one to three ranks hold padding (or one row and padding) only."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(10, 6, generator=generator) * 3).to(dtype)
    weight = torch.randn(8, 6, generator=generator).to(dtype)
    labels = torch.randint(0, vocab_size, (10,), generator=generator)
    answers = ranks.run(
        sharded_logprobs, tp, tiny_config(model_folder, tp=tp), hidden, weight, labels, vocab_size
    )

    exact_hidden = hidden.double().requires_grad_()
    exact_weight = weight.double().requires_grad_()
    table = (exact_hidden @ exact_weight[:vocab_size].t() / 0.7).log_softmax(-1)
    chosen = table[torch.arange(10), labels]
    (chosen * torch.arange(1, 11)).sum().backward()
    expected = {"logprobs": chosen.detach(), "entropy": -(table.exp() * table).sum(-1).detach()}
    expected |= {"grad_hidden": exact_hidden.grad, "grad_weight": exact_weight.grad}

    for by_chunk in zip(*answers, strict=True):
        whole = torch.cat([answer["grad_weight"] for answer in by_chunk])
        for answer in by_chunk:
            for name, want in expected.items():
                got = whole if name == "grad_weight" else answer[name]
                # Values are float32 whatever the weights; gradients have the weights' dtype, and
                # ranks' parts of the hidden states' are summed in it.
                is_rounded = dtype is torch.bfloat16 and "grad" in name
                tolerance = (2e-2 if is_rounded else 2e-6) * float(want.abs().max())
                torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


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
            {"tp": 3},
            3,
            "parallel.tensor=3: does not divide 4 attention heads of model; allowed: 1, 2, 4",
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
