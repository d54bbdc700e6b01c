"""Advantages of episode trees against independent float64 formulas, for every shape of group."""

import random
import statistics
from dataclasses import replace
from functools import partial

import pytest

from megatron_matpo.algo.advantages import (
    episode_advantages,
    group_advantages,
    num_uninformative_groups,
)
from megatron_matpo.algo.reference import reference_group_advantages
from megatron_matpo.data.samples import to_reference_samples, to_samples
from megatron_matpo.types import Role, TurnKind
from tests.helpers.episodes import make_batch

GRPO = partial(group_advantages, normalize_std=True)


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
    advantages = episode_advantages(batch.groups, GRPO)
    rng = random.Random(seed + 100)
    shuffled = [
        replace(group, episodes=tuple(rng.sample(group.episodes, len(group.episodes))))
        for group in rng.sample(batch.groups, len(batch.groups))
    ]
    assert episode_advantages(shuffled, GRPO) == pytest.approx(advantages)
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
            assert list(episode_advantages([group], GRPO).values()) == list(
                episode_advantages([other], GRPO).values()
            )


def test_scale_zero_teaches_nothing():
    advantages = episode_advantages(make_batch(1).groups, GRPO, scale=0.0)
    assert set(advantages.values()) <= {0.0, -0.0}


def test_uninformative_groups_are_counted():
    groups = make_batch(5).groups
    expected = sum(len({e.reward.total for e in g.episodes if e.reward}) < 2 for g in groups)
    assert num_uninformative_groups(groups) == expected


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_leave_one_out_is_the_mean_of_the_others(seed, normalize):
    rng = random.Random(seed)
    rewards = [rng.random() for _ in range(rng.randint(2, 9))]
    scale = statistics.stdev(rewards) + 1e-6 if normalize else 1.0
    expected = [
        (r - statistics.fmean(rewards[:i] + rewards[i + 1 :])) / scale
        for i, r in enumerate(rewards)
    ]
    actual = group_advantages(rewards, normalize_std=normalize, baseline="leave_one_out")
    assert actual == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert group_advantages([0.1] * 8, normalize_std=normalize, baseline="leave_one_out") == [0] * 8


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.1] * 8, [-0.0074] * 8),
        ([0.95] * 8, [0.056] * 8),
        ([1.0] * 8, [0.0] * 8),
        ([0.10] * 6 + [0.05] * 2, [0.54] * 6 + [-1.62] * 2),
        ([0.4], [0.4]),
        ([], []),
    ],
    ids=str,
)
def test_the_originals_figures(rewards, expected):
    """Section 4.1 of the specification; a group of one has mean 0 and deviation 1."""
    actual = reference_group_advantages(rewards, normalize_std=True)
    assert [round(value, 4 if abs(value) < 0.01 else 3) for value in actual] == pytest.approx(
        expected, abs=0.0005
    )


def test_the_originals_advantages_without_std_are_centered():
    actual = reference_group_advantages([1.0, 0.5, 0.0], normalize_std=False)
    assert actual == [0.5, 0.0, -0.5]


@pytest.mark.parametrize("seed", range(10))
def test_the_originals_workers_inherit_the_parents_masked_row(seed):
    """C1, token by token: response position t counts from the end of the initial prompt."""
    batch = make_batch(seed, max_workers=4)
    advantages = episode_advantages(batch.groups, GRPO)
    samples = {s.trajectory_id: s for s in to_reference_samples(batch, advantages)}
    kept = lost = 0
    for episode in (e for g in batch.groups for e in g.episodes if e.id in advantages):
        assert samples[episode.planner.id].advantage_mask is None
        parent = [u.kind is TurnKind.MODEL for u in episode.planner.turns[1:] for _ in u.token_ids]
        for worker in episode.workers:
            mask = samples[worker.id].advantage_mask
            start = len(worker.turns[0].token_ids)
            for position in range(start, worker.num_tokens):
                t = position - start
                expected = t < len(parent) and parent[t]
                assert mask[position - 1] == expected
                trained = samples[worker.id].loss_mask[position - 1]
                kept += trained and expected
                lost += trained and not expected
    assert kept > 0 and lost > 0


def test_the_originals_order_is_planners_then_workers():
    batch = make_batch(2)
    advantages = episode_advantages(batch.groups, GRPO)
    ours, theirs = to_samples(batch, advantages), to_reference_samples(batch, advantages)
    roles = [s.role for s in theirs]
    assert roles == sorted(roles, key=lambda role: role is Role.WORKER)
    assert {s.trajectory_id for s in theirs} == {s.trajectory_id for s in ours}
    planners = [s.trajectory_id for s in ours if s.role is Role.PLANNER]
    assert [s.trajectory_id for s in theirs][: len(planners)] == planners
