"""The invariants that `data/schedule.py` promises, on random length distributions."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from benchmarks.matpo_lengths import CONTEXT_TOKENS, matpo_step
from megatron_matpo.data.schedule import (
    _cost,
    num_tokens,
    num_trained_tokens,
    packed_room,
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


def of_lengths(lengths):
    return [
        TrainSample(f"{i}", f"{i}", Role.PLANNER, [1] * n, [2] * n, [1] * n, [0.0] * n, 0.5)
        for i, n in enumerate(lengths)
    ]


# The same examples every time; raise the number to search for more.
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 60) | st.integers(60, 400), max_size=60),
    st.sampled_from([1, 64, 200, 500, 100_000]),
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([1, 4]),
    st.randoms(use_true_random=False),
)
def test_schedule_invariants(lengths, budget, num_ranks, multiple, rng):
    samples = of_lengths(lengths)
    plan = schedule(samples, budget, num_ranks, multiple)
    assert len(plan) == num_ranks
    (count,) = {len(bins) for bins in plan}
    assert count >= 1
    micro_batches = [item for bins in plan for item in bins]
    seen = [s.trajectory_id for item in micro_batches for s in item]
    assert sorted(seen) == sorted(s.trajectory_id for s in samples)
    sizes = [sum(-(-len(s.input_ids) // multiple) * multiple for s in b) for b in micro_batches]
    for item, size in zip(micro_batches, sizes, strict=True):
        assert len(item) <= 1 or size <= budget
    event("with empty ones" if not all(micro_batches) else "all filled")
    costs = [
        [sum(_cost(-(-len(s.input_ids) // multiple) * multiple) for s in b) for b in bins]
        for bins in plan
    ]
    loads = [sum(of_rank) for of_rank in costs]
    assert max(loads) - min(loads) <= max(cost for of_rank in costs for cost in of_rank) + 1e-6
    # Best fit leaves at most one micro-batch half empty; then the number is rounded up.
    halves = sum(min(budget, size) for size in sizes) / (budget / 2)
    assert len(micro_batches) < halves + 1 + num_ranks
    assert packed_room(plan, budget) >= num_tokens(samples)
    assert plan == schedule(rng.sample(samples, len(samples)), budget, num_ranks, multiple)


@pytest.mark.parametrize("num_ranks", [1, 4, 16])
def test_a_step_like_matpos_wastes_less_than_3_percent(num_ranks):
    """Of the budget, ends and empty micro-batches of all ranks included; ranks are balanced."""
    for seed in range(3):
        lengths = [length - 1 for episode in matpo_step(seed) for length in episode]
        assert 5_000 < len(lengths) < 7_000 and CONTEXT_TOKENS > max(lengths) > 40_900
        samples = [
            SimpleNamespace(trajectory_id=i, input_ids=range(n)) for i, n in enumerate(lengths)
        ]
        plan = schedule(samples, CONTEXT_TOKENS, num_ranks)
        assert num_ranks * len(plan[0]) * CONTEXT_TOKENS == packed_room(plan, CONTEXT_TOKENS)
        assert 1 - sum(lengths) / packed_room(plan, CONTEXT_TOKENS) < 0.02
        loads = [sum(_cost(len(s.input_ids)) for b in bins for s in b) for bins in plan]
        assert max(loads) < 1.01 * sum(loads) / num_ranks


def test_few_samples_are_spread_evenly():
    """Where there is room, micro-batches cost the same, rather than all but the last being full."""
    plan = schedule(of_lengths([10] * 40), 110, 4)
    assert [[num_tokens(item) for item in bins] for bins in plan] == [[100]] * 4


def test_attention_makes_a_long_sample_dearer_than_short_ones_of_as_many_tokens():
    long, *short = of_lengths([40_000, *[1_000] * 50])
    plan = schedule([long, *short], 40_000, 2)
    assert [len(bins) for bins in plan] == [2, 2]
    (with_long,) = (bins for bins in plan if long in [s for item in bins for s in item])
    assert sum(num_tokens(item) for item in with_long) == 40_000


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
