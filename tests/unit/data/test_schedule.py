"""The invariants that `data/schedule.py` promises, on random length distributions."""

import random

import pytest

from megatron_matpo.data.schedule import (
    num_trained_tokens,
    padded_tokens,
    schedule,
    split_updates,
)
from megatron_matpo.types import Role, TrainSample


def make_samples(seed, num_episodes=12, longest=300):
    rng = random.Random(seed)
    samples = []
    for e in range(num_episodes):
        for t in range(rng.randint(1, 4)):
            length = max(2, int(rng.paretovariate(1.2) * longest / 20)) % longest + 2
            mask = [rng.randint(0, 1) for _ in range(length)]
            role = Role.WORKER if t else Role.PLANNER
            samples.append(
                TrainSample(
                    f"{e}.{t}", f"{e}", role, [1] * length, [2] * length, mask, [0.0] * length, 0.5
                )
            )
    return samples


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [64, 500, 100_000])
def test_schedule_invariants(seed, num_ranks, budget):
    samples = make_samples(seed)
    plan = schedule(samples, budget, num_ranks)
    assert len(plan) == num_ranks
    assert len({len(bins) for bins in plan}) == 1
    seen = [s.trajectory_id for bins in plan for item in bins for s in item]
    assert sorted(seen) == sorted(s.trajectory_id for s in samples)
    for bins in plan:
        for item in bins:
            assert len(item) <= 1 or padded_tokens(item) <= budget
    assert plan == schedule(list(reversed(samples)), budget, num_ranks)


@pytest.mark.parametrize("num_updates", [1, 2, 5, 40])
def test_updates_hold_whole_episodes(num_updates):
    samples = make_samples(3)
    updates = split_updates(samples, num_updates)
    assert [s for update in updates for s in update] == samples
    trees = [{s.episode_id for s in update} for update in updates]
    assert sum(map(len, trees)) == len(set().union(*trees)) == 12
    assert len(updates) == min(num_updates, 12)
    assert max(map(len, trees)) - min(map(len, trees)) <= 1


def test_denominator_counts_workers():
    samples = make_samples(1)
    assert num_trained_tokens(samples) == sum(sum(s.loss_mask) for s in samples)


def test_more_ranks_than_samples_gives_empty_bins():
    samples = make_samples(0, num_episodes=1)[:1]
    plan = schedule(samples, 1000, 4)
    assert [len(bins) for bins in plan] == [1, 1, 1, 1]
    assert sum(len(item) for bins in plan for item in bins) == 1
