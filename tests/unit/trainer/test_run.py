"""The reward's metrics: unweighted parts, and the judge's verdicts where there are any."""

import math
import random
from dataclasses import replace

import pytest

from megatron_matpo.obs import metrics as registry
from megatron_matpo.trainer.run import reward_metrics
from megatron_matpo.types import Episode, Group, Reward, RolloutBatch
from tests.helpers.episodes import make_episode


def batch(*rewards: Reward | None) -> RolloutBatch:
    episodes: list[Episode] = [
        replace(make_episode(random.Random(i), "q", i, None, 0), reward=reward)
        for i, reward in enumerate(rewards)
    ]
    return RolloutBatch(1, 0, (Group("q", "test", "?", "x", 0, tuple(episodes)),))


def test_verdicts_are_counted_among_those_that_were_judged():
    values = reward_metrics(
        batch(
            Reward(1.0, 1.0, 1.0, "correct"),
            Reward(0.0, 0.5, 0.05, "not_attempted"),
            Reward(0.0, 0.5, 0.05, "incorrect"),
            Reward(0.0, 0.0, 0.0),  # without an answer
            None,  # the judge was out
        )
    )
    registry.check(values, partial=True)
    assert values["reward/accuracy"] == 0.25, "not multiplied by its weight"
    assert values["reward/total"] == pytest.approx(1.1 / 4)
    assert values["reward/format"] == 0.5
    assert values["reward/not_attempted"] == pytest.approx(1 / 3)
    assert values["reward/judged"] == 0.75


def test_offline_graders_have_no_verdicts():
    values = reward_metrics(batch(Reward(1.0, 1.0, 1.0)))
    assert values.keys() == {"reward/total", "reward/accuracy", "reward/format"}


def test_nothing_scored_is_not_zero():
    assert all(math.isnan(value) for value in reward_metrics(batch(None, None)).values())
