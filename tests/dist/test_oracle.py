"""Loss and gradients of an update are an unsharded float64 oracle's, over the layouts of 8 ranks.

Proved, from trees of episodes to full gradients: the loss within 1e-6 relative, every gradient
within 1e-5 of its largest entry, with and without workers, for several micro-batch budgets, for
clipped ratios to the engine's log-probs and for truncated importance weights, for means over
tokens, trajectories and episodes. `make test` runs a few layouts, one of 8 ranks; all 26 that the
model allows are `pytest -m sweep tests/dist/test_oracle.py`. Not proved: bf16, NCCL, Transformer
Engine.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_matpo.config import Config
from megatron_matpo.types import RolloutBatch
from tests.helpers.dist import RankPool
from tests.helpers.episodes import make_batch as make_episodes
from tests.helpers.learner_ranks import first_updates, for_tiny_model, with_algo
from tests.helpers.oracle import Oracle, oracle
from tests.helpers.tiny import make_tiny_model, tiny_config

pytestmark = pytest.mark.dist

WITH_WORKERS = for_tiny_model(make_episodes(3, num_groups=2))
ALONE = for_tiny_model(make_episodes(4, num_groups=2, max_workers=0))
# What is computed, apart from how it is cut: batch and changes of `algo`. Terms of both signs do
# not cancel to less than 0.1 (advantages are about 1), so that a relative bound is one on
# arithmetic.
PROBLEMS: list[tuple[RolloutBatch, dict[str, object]]] = [
    (WITH_WORKERS, {"old_logprobs": "engine", "clip_low": 0.1, "clip_high": 0.3}),
    (WITH_WORKERS, {"tis": "truncate", "tis_cap": 1.2, "aggregation": "trajectory"}),
    (ALONE, {"old_logprobs": "engine", "aggregation": "episode", "normalize_std": False}),
]
BUDGETS = (40, 90, 100_000)
SIZES = (1, 2, 4, 8)
LAYOUTS = [
    (tp, pp, dp) for tp, pp, dp in itertools.product(SIZES, SIZES, range(1, 9)) if tp * pp * dp <= 8
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers, 8 key/value heads and 8 x 6 channels: up to 8 ranks in each dimension.

    Heads of 8: the norm over a head of 4 amplifies float32 rounding to 8e-6 on a single rank and
    1.01e-5 on TP8, at the bound; with 8 both stay below 4e-6.
    """
    wide = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8}
    folder = tmp_path_factory.mktemp("oracle") / "model"
    return make_tiny_model(folder, tied=False, num_hidden_layers=8, **wide)


def make_config(folder: Path, layout: tuple[int, int, int], budget: int, **algo: object) -> Config:
    tp, pp, dp = layout
    config = tiny_config(folder, tp=tp, pp=pp, dp=dp, micro_batch_tokens=budget)
    config = replace(config, rollout=replace(config.rollout, temperature=0.8))
    return with_algo(config, **algo)


@pytest.fixture(scope="module")
def expected(model_folder: Path) -> list[Oracle]:
    return [
        oracle(model_folder, make_config(model_folder, (1, 1, 1), 1, **algo), batch)
        for batch, algo in PROBLEMS
    ]


def check(
    ranks: RankPool,
    folder: Path,
    layout: tuple[int, int, int],
    expected: list[Oracle],
    budgets: tuple[int, ...] = BUDGETS,
) -> list[int]:
    """Every problem with every budget; the numbers of micro-batches, to see that they differ."""
    cases = [
        (number, make_config(folder, layout, budget, **algo), batch)
        for number, (batch, algo) in enumerate(PROBLEMS)
        for budget in budgets
    ]
    size = layout[0] * layout[1] * layout[2]
    work = [(config, batch) for _, config, batch in cases]
    answers = ranks.run(first_updates, size, work, timeout_s=240)
    for (number, config, _), of_ranks in zip(cases, zip(*answers, strict=True), strict=True):
        want = expected[number]
        where = f"{layout}, problem {number}, budget {config.train.micro_batch_tokens}"
        for story in of_ranks:
            assert story["loss"] == pytest.approx(want.loss, rel=1e-6), where
        gradients = of_ranks[0]["gradients"]
        assert gradients.keys() == want.gradients.keys()
        for name, gradient in want.gradients.items():
            error = float((gradients[name].double() - gradient).abs().max())
            assert error <= 1e-5 * float(gradient.abs().max()), f"{where}, {name}: {error}"
    return [story["num_batches"] for story in answers[0]]


# tp, pp, dp: all dimensions together, and none.
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 2)], ids=["single", "all8"])
def test_an_update_is_the_oracles(ranks: RankPool, model_folder, expected, layout):
    num_batches = check(ranks, model_folder, layout, expected)
    assert num_batches[0] > num_batches[2], "the budgets cut differently"


@pytest.mark.parametrize("layout", [(4, 1, 1), (1, 4, 1), (1, 1, 3)], ids=["tp4", "pp4", "dp3"])
def test_an_update_of_one_dimension_is_the_oracles(ranks: RankPool, model_folder, expected, layout):
    check(ranks, model_folder, layout, expected, BUDGETS[1:2])


@pytest.mark.sweep
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_the_oracles_update(ranks: RankPool, model_folder, expected, layout):
    check(ranks, model_folder, layout, expected)


def test_the_problems_use_what_they_claim(expected):
    """Losses differ from each other and from 0."""
    losses = [item.loss for item in expected]
    assert len({round(loss, 3) for loss in losses}) == len(losses)
    assert all(abs(loss) > 0.1 for loss in losses)
