"""Every family, in every layout, computes what transformers does, and trains to the same weights.

Proved here, on gloo and in float32, for seeded random configurations (fewer key/value heads than
tensor-parallel ranks, tied and untied embeddings, a vocabulary that has to be padded, biases, Llama
3's frequencies, sliding windows, experts in some layers): bit-exact round trips of the weights,
log-probs and entropies (packed, and each sample alone in its micro-batch) and gradients against
transformers, and two updates against the single process, over tensor, pipeline (with chunks),
expert and sequence parallelism. `make test` takes some layouts of each family (Qwen3 is in
`test_layouts.py` as well), `pytest -m sweep tests/dist/test_families.py` the others.

Not proved: bf16, NCCL, Transformer Engine, context parallelism.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_matpo.config.train import ParallelConfig
from tests.helpers.dist import RankPool
from tests.helpers.hf_models import FAMILIES, random_config, split_experts, write_model
from tests.helpers.megatron_ranks import short_story
from tests.helpers.tiny import make_batch, reference_grads, reference_logprobs, tiny_config

pytestmark = pytest.mark.dist

# Four, for two replicas.
BATCHES = [
    make_batch((3, 16), 0),
    make_batch((2, 8), 1),
    make_batch((4, 12), 2),
    make_batch((1, 24), 3),
]
# A wider sweep on request: MATPO_FAMILY_SEEDS=20 pytest tests/dist/test_families.py
SEEDS = range(int(os.environ.get("MATPO_FAMILY_SEEDS", "1")))

DENSE = {
    "tp2": ParallelConfig(tensor=2),
    "tp4": ParallelConfig(tensor=4),
    "pp2": ParallelConfig(pipeline=2),
    "tp2 pp2 sequence": ParallelConfig(tensor=2, pipeline=2, sequence=True),
    "pp2 virtual2": ParallelConfig(pipeline=2, virtual=2),
    "tp4 pp2": ParallelConfig(tensor=4, pipeline=2),
}
EXPERTS = {
    "dp2 ep2": ParallelConfig(data=2, expert=2),
    "tp2": ParallelConfig(tensor=2, sequence=True),
    "tp4 ep2": ParallelConfig(tensor=4, expert=2, sequence=True),
    "pp2 dp2 ep2": ParallelConfig(pipeline=2, data=2, expert=2),
    "tp2 pp2 ep2 virtual2": ParallelConfig(
        tensor=2, pipeline=2, virtual=2, expert=2, sequence=True
    ),
    "tp4 pp2 ep4": ParallelConfig(tensor=4, pipeline=2, expert=4, sequence=True),
}
# Tied embeddings with experts, which seed 0 does not draw: the embedding's gradients are summed
# over two stages while each replica holds a part of them.
TIED_EXPERTS = pytest.param(
    "qwen3_moe", 3, EXPERTS["pp2 dp2 ep2"], id="qwen3_moe-3-tied-pp2-dp2-ep2"
)
# What `make test` takes: for each family both dimensions at once, and for some a way of its own.
ALWAYS = {
    "qwen2": ("pp2 virtual2", "tp2 pp2 sequence"),
    "qwen3": ("tp4 pp2",),
    "qwen3_moe": ("tp4 ep2", "tp2 pp2 ep2 virtual2"),
    "llama": ("tp4", "tp2 pp2 sequence"),
    "mistral": ("tp4", "tp2 pp2 sequence"),
}
CASES = [
    pytest.param(
        family,
        seed,
        layout,
        id=f"{family}-{seed}-{name.replace(' ', '-')}",
        marks=() if name in ALWAYS[family] else pytest.mark.sweep,
    )
    for family in FAMILIES
    for seed in SEEDS
    for name, layout in (EXPERTS if family == "qwen3_moe" else DENSE).items()
] + [TIED_EXPERTS]


@dataclass(frozen=True)
class Oracle:
    """A model, what transformers computes of it, and what one process trains it to."""

    folder: Path
    logprobs: list[tuple[torch.Tensor, torch.Tensor]]
    grads: dict[str, torch.Tensor]
    single: dict[str, Any]


def run(ranks: RankPool, folder: Path, layout: ParallelConfig) -> list[dict[str, Any]]:
    """`short_story` of every rank; up to eight of them may have to be started first."""
    config = replace(tiny_config(folder, timeout_s=200.0), parallel=layout)
    return ranks.run(short_story, layout.world_size, config, BATCHES, timeout_s=300.0)


@pytest.fixture(scope="module")
def oracles(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory):
    made: dict[tuple[str, int], Oracle] = {}

    def make(family: str, seed: int) -> Oracle:
        if (family, seed) not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            write_model(random_config(family, seed), folder, seed)
            (single,) = run(ranks, folder, ParallelConfig())
            made[family, seed] = Oracle(
                folder,
                reference_logprobs(folder, BATCHES),
                split_experts(reference_grads(folder, BATCHES)[1]),
                single,
            )
        return made[family, seed]

    return make


def check_against_transformers(story: dict[str, Any], oracle: Oracle) -> None:
    """Round trip, log-probs and gradients of global rank 0."""
    original = load_file(oracle.folder / "model.safetensors")
    assert set(story["initial"]) == set(original)
    for name, value in original.items():
        assert torch.equal(story["initial"][name], value), name
    assert_close(story["grads"], {name: oracle.grads[name] for name in story["grads"]})


def check_scores(story: dict[str, Any], oracle: Oracle, dp_size: int) -> None:
    """Log-probs and entropies of any rank, of packed rows and of samples alone."""
    alone = [
        (logprobs, entropy)
        for batch, of_batch in zip(BATCHES, oracle.logprobs, strict=True)
        for logprobs, entropy in zip(*(x.split(batch.lengths) for x in of_batch), strict=True)
    ]
    for kind, everything in (("scores", oracle.logprobs), ("alone", alone)):
        mine = everything[story["dp_rank"] :: dp_size]
        for actual, expected in zip(story[kind], mine, strict=True):
            for got, want in zip(actual, expected, strict=True):
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_computes_what_transformers_computes(oracles, family, seed):
    oracle = oracles(family, seed)
    check_against_transformers(oracle.single, oracle)
    check_scores(oracle.single, oracle, 1)
    assert set(oracle.grads) == set(oracle.single["grads"])
    assert oracle.single["updates"][0].grad_norm > 0.5, "clipping is part of what is compared"


@pytest.mark.parametrize(("family", "seed", "layout"), CASES)
def test_every_layout_computes_and_trains_the_same(ranks, oracles, family, seed, layout):
    oracle = oracles(family, seed)
    stories = run(ranks, oracle.folder, layout)
    check_against_transformers(stories[0], oracle)
    for story in stories:
        check_scores(story, oracle, layout.data)
        for actual, want in zip(story["updates"], oracle.single["updates"], strict=True):
            assert actual.loss == pytest.approx(want.loss, rel=1e-5, abs=1e-6)
            assert actual.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)
            assert actual.metrics == pytest.approx(want.metrics, rel=1e-5)
    assert_close(stories[0]["final"], oracle.single["final"])
    assert not any(story["initial"] for story in stories[1:])
