"""Proves when training evaluates, what it asks, and where metrics and recordings go.

Model, learner and engines are stand-ins; statistics are proved in tests/unit/evaluation.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.evaluation import EvalConfig
from megatron_matpo.config.run import ObsConfig
from megatron_matpo.obs.metrics_log import read_metrics
from megatron_matpo.obs.status import PhaseWriter
from megatron_matpo.trainer.clock import Clock
from megatron_matpo.trainer.placement import Apart
from megatron_matpo.trainer.run import Progress, Run, RunLog
from tests.helpers.episodes import make_batch

CONFIG = Config(
    eval=EvalConfig(sets=["d/gaia.parquet", "frames"], every=2, num_resamples=100),
    obs=ObsConfig(wandb_mode="disabled"),
)


class StubRollouts:
    def __init__(self):
        self.asked = []

    def connect(self):
        pass

    def collect(self, step, version, split="train", *, position=0):
        self.asked.append((step, version, split))
        return replace(make_batch(step), step=step)


def make_run(folder: Path, config: Config = CONFIG, *, is_logging: bool = True) -> Run:
    clock = Clock(PhaseWriter(folder, "trainer", 0))
    log = RunLog(config, folder) if is_logging else None
    parts = {"actor": None, "learner": None, "sync": None, "throughput": None}
    parts["placement"] = Apart()
    return Run(
        config=config, run_dir=folder, rollouts=StubRollouts(), clock=clock, log=log, **parts
    )


def test_all_sets_are_asked_when_an_evaluation_is_due(tmp_path):
    run = make_run(tmp_path)
    assert run.evaluate(1, 1) == {}
    values = run.evaluate(2, 2)
    assert run.rollouts.asked == [(2, 2, "gaia"), (2, 2, "frames")]
    batch = make_batch(2)
    num_episodes = sum(len(group.episodes) for group in batch.groups)
    scored = [
        [e.reward.accuracy for e in group.episodes if e.reward is not None]
        for group in batch.groups
    ]
    means = [sum(items) / len(items) for items in scored if items]
    (label,) = {name.split("/")[2] for name in values if "mean@" in name}
    for name in ("gaia", "frames"):
        assert values[f"eval/{name}/episodes"] == num_episodes
        assert values[f"eval/{name}/{label}"] == pytest.approx(sum(means) / len(means))
        lines = (tmp_path / "eval" / f"step_000002_{name}.jsonl").read_text().splitlines()
        assert {json.loads(line)["step"] for line in lines} == {2}
        assert {json.loads(line)["advantage"] for line in lines} == {None}


def test_other_ranks_ask_and_write_nothing(tmp_path):
    run = make_run(tmp_path, is_logging=False)
    assert run.evaluate(2, 2) == {}
    assert len(run.rollouts.asked) == 2, "all ranks take part in sharing the bytes"
    assert not (tmp_path / "eval").exists()


def test_the_initial_policy_is_evaluated_only_on_demand_and_at_the_start(tmp_path):
    run = make_run(tmp_path)
    run.evaluate_start(Progress(), 0)
    assert run.rollouts.asked == [], "0 is a multiple of eval.every, but nobody wanted it"
    config = replace(CONFIG, eval=replace(CONFIG.eval, before_train=True, every=0))
    run = make_run(tmp_path, config)
    run.evaluate_start(Progress(step=3), 3)
    assert run.rollouts.asked == []
    run.evaluate_start(Progress(), 0)
    assert run.rollouts.asked == [(0, 0, "gaia"), (0, 0, "frames")]
    (line,) = read_metrics(tmp_path)
    assert line["step"] == 0 and "eval/gaia/episodes" in line
    assert run.evaluate(1, 1) == {}


def test_a_run_that_starts_again_from_nothing_has_one_line_of_step_0(tmp_path):
    config = replace(CONFIG, eval=replace(CONFIG.eval, before_train=True))
    for _ in range(2):
        run = make_run(tmp_path, config)
        assert run.log is not None
        run.log.resume_after(0)
        run.evaluate_start(Progress(), 0)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0]


def test_a_replay_is_not_evaluated(tmp_path):
    config = replace(CONFIG, rollout=replace(CONFIG.rollout, replay="recorded"))
    run = make_run(tmp_path, config)
    assert run.evaluate(2, 2) == {}
    assert run.rollouts.asked == []
