"""Proves that what is in flight survives a kill: no question is lost or asked twice.

In virtual time, as `test_open_groups.py`; with real servers in tests/smoke/test_async.py.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace

import pytest

from megatron_matpo import wire
from megatron_matpo.errors import DataError
from megatron_matpo.types import RolloutBatch
from tests.helpers.moving_policy import (
    NUM_ROWS,
    MovingPolicy,
    all_groups,
    asked_in_order,
    drawn,
    manager_of,
    rows_of,
    run,
    single_agent,
    train,
    versions_of,
)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_killed_when_no_question_is_lost_or_asked_twice(seed: int) -> None:
    rng = random.Random(seed)
    config = single_agent(
        num_prompts=rng.randint(1, 4),
        num_samples=rng.randint(1, 3),
        max_staleness=rng.randint(0, 3),
        over_sample=rng.choice([0.3, 0.5, 1.0]),
        on_stale=rng.choice(["wait", "refresh", "drop"]),
        max_concurrent_episodes=rng.choice([3, 1000]),
    )
    trained: list[RolloutBatch] = []
    dropped, step, saved = 0.0, 0, b""
    for attempt in range(4):
        policy = MovingPolicy(drawn(seed + attempt), first_version=step)
        manager = manager_of(config, policy, NUM_ROWS)
        if saved:
            manager.restore(wire.decode(saved))

        async def work(first: int = step, m=manager, p=policy) -> tuple[list[RolloutBatch], bytes]:
            batches = await train(m, p, rng.randint(1, 4), rng.uniform(0, 3), first + 1)
            done = first + len(batches)
            if rng.random() < 0.5:  # a stop in the middle of the next step's collection
                asked = asyncio.create_task(m.collect(done + 1, p.version))
                await asyncio.sleep(rng.uniform(0, 3))
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
            state = m.in_flight(done)
            assert state is not None
            await m.close()
            return batches, wire.encode(state)

        (batches, saved), _ = run(work())
        trained += batches
        step += len(batches)
        dropped += sum(batch.metrics.get("rollout/dropped_groups", 0.0) for batch in batches)
    left = wire.decode(saved)
    handed = all_groups(trained)
    asked = asked_in_order(config, left.next_position)
    met = Counter(rows_of([*handed, *left.groups]))
    assert met <= asked
    # A stop can come between a drop and the hand-over that counts it.
    assert (asked - met).total() >= dropped if config.rollout.on_stale == "drop" else met == asked
    ids = [episode.id for group in [*handed, *left.groups] for episode in group.episodes]
    assert len(set(ids)) == len(ids)
    for batch in trained:
        assert len(batch.groups) == config.data.prompts_per_step
        assert all(len(g.episodes) == config.data.samples_per_prompt for g in batch.groups)
        oldest = batch.policy_version - config.rollout.max_staleness
        assert oldest <= min(versions_of(batch)) and max(versions_of(batch)) <= batch.policy_version


def test_finished_episodes_are_not_run_again_after_a_resume() -> None:
    slow = ("train-1-0.1.p", "train-1-2.0.p")
    config = single_agent(max_staleness=1)
    policy = MovingPolicy(lambda conversation: 50.0 if conversation in slow else 1.0)
    manager = manager_of(config, policy, NUM_ROWS)

    async def first() -> bytes:
        await manager.collect(1, 0)
        saved = manager.in_flight(1)
        assert saved is not None
        await manager.close()
        return wire.encode(saved)

    saved = wire.decode(run(first())[0])
    assert [len(group.episodes) for group in saved.groups] == [1, 1, 2]
    again = MovingPolicy(lambda conversation: 1.0, first_version=1)
    resumed = manager_of(config, again, NUM_ROWS)
    resumed.restore(saved)
    batch = run(resumed.collect(2, 1))[0]
    begun_anew = {name for name in again.asked if name.startswith("train-1-")}
    assert begun_anew == set(slow)
    assert {group.uid for group in saved.groups} == {group.uid for group in batch.groups}


def test_groups_handed_over_but_not_trained_are_still_in_flight() -> None:
    """A stop leaves a request behind, whose answer nobody reads."""
    config = single_agent(max_staleness=1)
    policy = MovingPolicy(drawn(2))
    manager = manager_of(config, policy, NUM_ROWS)

    async def work() -> None:
        first = await manager.collect(1, 0)
        policy.push()
        unread = await manager.collect(2, 1)
        state = manager.in_flight(1)
        assert state is not None
        assert {g.uid for g in unread.groups} <= {g.uid for g in state.groups}
        assert not {g.uid for g in first.groups} & {g.uid for g in state.groups}
        assert await manager.collect(2, 1) is unread, "asked again, the same batch"
        after = manager.in_flight(2)
        assert after is not None
        assert not {g.uid for g in unread.groups} & {g.uid for g in after.groups}
        await manager.close()

    run(work())


def test_a_set_that_changed_is_refused() -> None:
    config = single_agent(max_staleness=1)
    policy = MovingPolicy(drawn(2))
    manager = manager_of(config, policy, NUM_ROWS)

    async def work() -> RolloutBatch:
        await manager.collect(1, 0)
        state = manager.in_flight(1)
        await manager.close()
        assert state is not None
        return state

    state = run(work())[0]
    other = replace(state.groups[0], question="Who else?")
    with pytest.raises(DataError, match="is not the question that the checkpoint has in flight"):
        manager_of(config, policy).restore(replace(state, groups=(other,)))
