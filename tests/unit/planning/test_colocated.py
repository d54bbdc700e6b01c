"""Trainer and engine on the same GPUs: phases against sums made by hand, and what is flagged.

Not proved: that a run takes so much. None was measured yet.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_matpo.planning.command import Expectation, RunPlan, make_run_plan
from megatron_matpo.planning.text import as_text

ROOT = Path(__file__).parents[3]
APART = "recipes/matpo-qwen3-14b-16n8g-a800.yaml"
TOGETHER = "recipes/matpo-qwen3-14b-16n8g-a800-colocated.yaml"
GIB = 2**30


@pytest.fixture(autouse=True)
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan(recipe: str, *overrides: str) -> RunPlan:
    return make_run_plan(recipe, list(overrides), Expectation())


def test_phases_are_sums_of_what_is_resident():
    said = plan(TOGETHER)
    train, push, rollout = said.phases
    ledger, engine = said.worst, said.engine
    assert engine is not None
    # 4 GiB: what an engine's process keeps; 4 GiB: the trainer's reserve.
    assert train.trainer == ledger.total
    assert train.engine == 4 * GIB
    largest = 2 * 151_936 * 5120 * 2
    assert push.trainer == ledger.weights + 4 * GIB + 256 * 2**20 + largest
    assert push.engine == 4 * GIB + engine.weights
    assert rollout.trainer == ledger.weights + 4 * GIB
    # Weights and cache together are SGLang's share of the card, to the last token.
    assert rollout.engine == pytest.approx(4 * GIB + 0.7 * 79.33 * GIB, abs=2**20)
    assert said.own is not None
    assert said.own.peak == max(train.total, push.total, rollout.total)


def test_the_optimizer_goes_to_the_host_and_gradients_do_not():
    apart, together = plan(APART), plan(TOGETHER)
    assert apart.own is not None
    assert together.own is not None
    assert apart.own.host == 0
    assert together.own.host == together.worst.optimizer
    assert apart.phases == ()
    assert apart.own.peak == apart.worst.total


def test_all_gpus_are_the_trainer_s_and_proposals_fit_in_every_phase():
    said = plan(TOGETHER)
    assert {item.layout.world_size for item in said.proposals} == {128}
    assert all(item.peak <= said.memory for item in said.proposals)
    text = as_text(said)
    assert "colocated  GiB of one GPU in each phase of a step, trainer + engine:" in text
    assert "host memory, per node" in text
    assert "colocated" not in as_text(plan(APART))


def test_an_engine_that_leaves_no_room_is_flagged():
    (problem,) = plan(TOGETHER, "rollout.mem_fraction=0.85").problems
    assert problem.startswith("trainer and engine on one GPU: need 82.")
    assert "A800-80G has 79.3" in problem
    # Nothing fits beside it, unless the trainer's weights are split further.
    assert all(
        item.layout.tensor * item.layout.pipeline > 4
        for item in plan(TOGETHER, "rollout.mem_fraction=0.85").proposals
    )


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        (
            TOGETHER,
            ["parallel.data=32"],
            "parallel: 256 trainer ranks, but there are 128 of 16",
        ),
        (
            TOGETHER,
            ["rollout.num_servers=65"],
            "engines: rollout.num_servers x rollout.tensor",
        ),
        (APART, ["rollout.num_servers=33"], "parallel: 64 trainer ranks, but the engines leave 62"),
        (APART, ["rollout.tensor=16", "rollout.num_servers=4"], "rollout.tensor=16: more than the"),
    ],
)
def test_the_number_of_gpus_is_checked(recipe, overrides, expected):
    (problem,) = plan(recipe, *overrides).problems
    assert problem.startswith(expected)


def test_an_evaluation_has_engines_and_no_trainer():
    said = plan("recipes/eval-qwen3-14b-2n8g-a800.yaml")
    assert said.own is None
    assert said.stages == said.proposals == said.phases == ()
    text = as_text(said)
    assert "trainer    none" in text
    assert "8 x 2 GPUs" in text
    assert text.endswith("fits\n")
    (problem,) = plan("recipes/eval-qwen3-14b-2n8g-a800.yaml", "rollout.num_servers=9").problems
    assert problem.startswith("engines: ")
