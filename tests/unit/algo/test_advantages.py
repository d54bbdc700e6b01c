"""Advantages of episode trees against independent float64 formulas, for every shape of group."""

import random
import statistics
from dataclasses import replace

import pytest

from megatron_matpo.algo.advantages import (
    episode_advantages,
    group_advantages,
    num_uninformative_groups,
)
from megatron_matpo.data.samples import to_samples
from megatron_matpo.types import Role
from tests.helpers.episodes import make_batch


def test_matches_the_published_example():
    # Six rewards of 0.10 and two of 0.05: +0.54 and -1.62.
    values = group_advantages([0.10] * 6 + [0.05] * 2, normalize_std=True)
    assert values[0] == pytest.approx(0.54, abs=0.005)
    assert values[-1] == pytest.approx(-1.62, abs=0.005)


@pytest.mark.parametrize("reward", [0.1, 0.95, 1.0, 0.05, 1 / 3])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_constant_groups_are_exactly_zero(reward, size):
    assert group_advantages([reward] * size, normalize_std=True) == [0.0] * size


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("normalize", [True, False])
def test_matches_statistics_module(seed, normalize):
    rng = random.Random(seed)
    rewards = [rng.random() for _ in range(rng.randint(2, 9))]
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    expected = [(r - mean) / (std + 1e-6 if normalize else 1.0) for r in rewards]
    assert group_advantages(rewards, normalize_std=normalize) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_tree_property(seed):
    """Order does not matter, failures are left out, workers carry their planner's scalar."""
    batch = make_batch(seed)
    advantages = episode_advantages(batch.groups, normalize_std=True)
    rng = random.Random(seed + 100)
    shuffled = [
        replace(group, episodes=tuple(rng.sample(group.episodes, len(group.episodes))))
        for group in rng.sample(batch.groups, len(batch.groups))
    ]
    assert episode_advantages(shuffled, normalize_std=True) == pytest.approx(advantages)
    scored = {e.id for g in batch.groups for e in g.episodes if e.reward is not None}
    assert advantages.keys() == scored
    samples = to_samples(batch, advantages)
    trajectories = {t.id: (e, t) for g in batch.groups for e in g.episodes for t in e.trajectories}
    expected_ids = {i for i, (e, _) in trajectories.items() if e.id in scored}
    assert {s.trajectory_id for s in samples} == expected_ids
    assert len(samples) == len(expected_ids)
    for sample in samples:
        episode, trajectory = trajectories[sample.trajectory_id]
        assert sample.advantage == advantages[episode.id]
        assert sum(sample.loss_mask) == trajectory.num_sampled_tokens
        assert sample.input_ids + sample.labels[-1:] == trajectory.token_ids
        trained = [t for t, m in zip(sample.labels, sample.loss_mask, strict=True) if m]
        sampled = [i for u in trajectory.turns if u.logprobs for i in u.token_ids]
        assert trained == sampled
        kept = [v for v, m in zip(sample.rollout_logprobs, sample.loss_mask, strict=True) if m]
        assert kept == [v for u in trajectory.turns for v in u.logprobs]
    assert any(s.role is Role.WORKER for s in samples) or seed > 0


def test_number_of_workers_does_not_move_the_baseline():
    batch = make_batch(3, max_workers=0)
    crowded = make_batch(3, max_workers=5)
    rewards = [[e.reward for e in g.episodes] for g in batch.groups]
    same = [
        replace(
            g, episodes=tuple(replace(e, reward=r) for e, r in zip(g.episodes, row, strict=False))
        )
        for g, row in zip(crowded.groups, rewards, strict=True)
        if len(row) == len(g.episodes)
    ]
    for group, other in zip(same, batch.groups, strict=False):
        if group.uid == other.uid:
            assert list(episode_advantages([group], normalize_std=True).values()) == list(
                episode_advantages([other], normalize_std=True).values()
            )


def test_scale_zero_teaches_nothing():
    advantages = episode_advantages(make_batch(1).groups, normalize_std=True, scale=0.0)
    assert set(advantages.values()) <= {0.0, -0.0}


def test_uninformative_groups_are_counted():
    groups = make_batch(5).groups
    expected = sum(len({e.reward.total for e in g.episodes if e.reward}) < 2 for g in groups)
    assert num_uninformative_groups(groups) == expected
