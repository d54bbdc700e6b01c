"""Assumed and given lengths, and how many micro-batches they fill."""

from __future__ import annotations

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.data import DataConfig
from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.planning.batches import (
    Workload,
    assumed_workload,
    count_bins,
    measured_workload,
    micro_batches_per_rank,
)

CONFIG = Config(
    data=DataConfig(prompts_per_step=32, samples_per_prompt=8),
    rollout=RolloutConfig(planner="main", context_length=40960),
    agents={"main": AgentConfig(role="planner", tools=["browser"]), "browser": AgentConfig()},
)


@pytest.mark.parametrize(("mean", "workers"), [(0, -1.0), (4000, 1.0), (30000, 0.0)])
def test_assumed_lengths_have_the_mean_and_a_long_tail(mean, workers):
    workload = assumed_workload(CONFIG, mean, workers)
    per_episode = 1 + (3.2 if workers < 0 else workers)
    assert len(workload.lengths) == round(256 * per_episode)
    expected = mean or 10240
    assert sum(workload.lengths) / len(workload.lengths) == pytest.approx(expected, rel=2e-3)
    assert min(workload.lengths) < expected < max(workload.lengths) <= 40960
    assert ("assumed" if not mean else "given") in workload.assumption


def test_without_worker_agents_there_are_none():
    config = Config(data=CONFIG.data, rollout=CONFIG.rollout, agents={"main": AgentConfig()})
    assert len(assumed_workload(config).lengths) == 256


def test_a_token_sees_longer_trajectories_than_a_trajectory_does():
    assert Workload((10, 30), "").length_seen == pytest.approx((100 + 900) / 40)


def test_bins():
    assert count_bins([7, 5, 5, 3], 10) == 2
    assert count_bins([12, 5, 5], 10) == 2  # longer than the budget: alone
    assert count_bins([], 10) == 0
    workload = Workload((10,) * 9, "")
    assert micro_batches_per_rank(workload, 10, 4, 1) == 3
    assert micro_batches_per_rank(workload, 10, 4, 3) == 1
    assert micro_batches_per_rank(workload, 10, 64, 1) == 1


def test_given_lengths_are_checked(tmp_path):
    file = tmp_path / "lengths"
    for text in ("", "3\nx\n", "0\n", "40961\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="--lengths="):
            measured_workload(CONFIG, str(file))
