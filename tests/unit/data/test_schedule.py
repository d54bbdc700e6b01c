"""The invariants that `data/schedule.py` promises, on random length distributions."""

import random
from collections import Counter

import pytest

from megatron_matpo.data.schedule import (
    num_trained_tokens,
    padded_tokens,
    schedule,
    split_by_trajectories,
    split_updates,
    total_weight,
    weigh,
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
    assert total_weight(weigh(samples, "token")) == num_trained_tokens(samples)


@pytest.mark.parametrize("aggregation", ["token", "trajectory", "episode"])
def test_every_unit_has_the_same_share(aggregation):
    samples = weigh(make_samples(4), aggregation)
    share = Counter()
    for index, sample in enumerate(samples):
        trained = sum(sample.loss_mask)
        unit = {"token": index, "trajectory": index, "episode": sample.episode_id}[aggregation]
        share[unit] += sample.loss_weight * trained
        if aggregation == "token":
            assert sample.loss_weight == 1.0
    units = {s.episode_id for s in samples if sum(s.loss_mask)}
    if aggregation != "token":
        assert [value for value in share.values() if value] == pytest.approx([1.0] * len(share))
    if aggregation == "episode":
        assert total_weight(samples) == pytest.approx(len(units))


def test_nothing_trained_is_no_division_by_zero():
    sample = TrainSample("0.0", "0", Role.PLANNER, [1], [2], [0], [0.0], 0.5)
    for aggregation in ("token", "trajectory", "episode"):
        assert total_weight(weigh([sample], aggregation)) == 1.0
    assert total_weight([]) == 1.0


@pytest.mark.parametrize("num_planners", [16, 2])
@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_the_originals_number_of_updates(num_planners, num_workers):
    """C6, the table of section 4.2: 0, 1, 2, 3 workers per planner make 1, 2, 3, 4 updates."""
    roles = [Role.PLANNER] * num_planners + [Role.WORKER] * (num_planners * num_workers)
    samples = [
        TrainSample(f"{i}", f"{i % num_planners}", role, [1], [2], [1], [0.0], 0.5)
        for i, role in enumerate(roles)
    ]
    updates = split_by_trajectories(samples, 1)
    assert len(updates) == 1 + num_workers
    assert [s for update in updates for s in update] == samples
    assert {len(update) for update in updates} == {num_planners}
    # Ours does not depend on how many workers the model spawned.
    assert len(split_updates(samples, 1)) == 1


def test_the_originals_last_update_can_be_nearly_empty():
    roles = [Role.PLANNER] * 8 + [Role.WORKER]
    samples = [
        TrainSample(f"{i}", f"{i % 8}", role, [1], [2], [1], [0.0], 0.5)
        for i, role in enumerate(roles)
    ]
    assert [len(update) for update in split_by_trajectories(samples, 2)] == [4, 4, 1]
    # A planner and its worker are in different updates.
    assert split_by_trajectories(samples, 1)[1][0].episode_id == "0"


def test_more_ranks_than_samples_gives_empty_bins():
    samples = make_samples(0, num_episodes=1)[:1]
    plan = schedule(samples, 1000, 4)
    assert [len(bins) for bins in plan] == [1, 1, 1, 1]
    assert sum(len(item) for bins in plan for item in bins) == 1
