"""Proves asynchronous rollout and over-sampling: order, ages, counts, and what a checkpoint holds.

In virtual time, with a scripted policy whose weights change while it samples. That real engines
and the router give such generations is in the smoke tests.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from megatron_matpo import wire
from megatron_matpo.data.dataset import prompts_from
from megatron_matpo.errors import DataError, EngineRejected, RolloutError
from megatron_matpo.obs import metrics as registry
from megatron_matpo.obs.span_files import read_spans, traced_steps
from megatron_matpo.rollout import scheduler
from megatron_matpo.rollout.collect import RolloutManager
from megatron_matpo.types import Group, RolloutBatch
from tests.helpers.moving_policy import (
    MovingPolicy,
    manager_of,
    single_agent,
    timeless,
    train,
    versions_of,
)
from tests.helpers.rollouts import FakeToolBox, delegate, make_chat, make_config, make_question
from tests.helpers.virtual_time import VirtualTimeLoop

T = TypeVar("T")
NUM_ROWS = 11


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "RETRY_PAUSE_S", 0.0)


def run(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """The result, and when it came."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work), runner.get_loop().time()


def drawn(seed: int, tail: float = 6.0):
    """Seconds of a conversation: mostly around 1, one in five far longer."""

    def seconds(conversation: str) -> float:
        rng = random.Random(f"{seed}/{conversation}")
        return rng.uniform(0.5, 1.5) * (tail if rng.random() < 0.2 else 1.0)

    return seconds


def rows_of(groups: Sequence[Group]) -> list[int]:
    return [group.row_index for group in groups]


def all_groups(batches: Sequence[RolloutBatch]) -> list[Group]:
    return [group for batch in batches for group in batch.groups]


def asked_in_order(config, count: int) -> Counter[int]:
    return Counter(prompts_from(NUM_ROWS, count, config.run.seed, 0))


def script(conversation: str, turns: dict[str, int]) -> str:
    turns[conversation] = turns.get(conversation, 0) + 1
    if conversation.endswith(".p") and turns[conversation] == 1:
        return delegate("find it")
    return "It is \\boxed{Ada}" if hash_of(conversation) else "It is \\boxed{Bob}"


def hash_of(text: str) -> bool:
    return random.Random(text).random() < 0.5


def test_a_bound_of_0_is_the_synchronous_step() -> None:
    """The same generations through both paths: the same batches, the same metrics."""
    config = make_config(max_episode_retries=1)
    questions = {"train": [make_question(f"Who is {i}?") for i in range(5)]}
    failed: set[tuple[int, str]] = set()

    def batches(lasting: bool) -> list[RolloutBatch]:
        failed.clear()
        turns: dict[str, int] = {}
        policy = MovingPolicy(drawn(3), lambda conversation: script(conversation, turns))
        manager = RolloutManager(config, policy.sampler, FakeToolBox(), make_chat(), questions)
        if lasting:
            manager.restore(RolloutBatch(0, 0, (), {}, 0))
        return run(train(manager, policy, 6))[0]

    plain, lasting = batches(False), batches(True)
    assert len(plain) == len(lasting) == 6
    for one, other in zip(plain, lasting, strict=True):
        assert timeless(one.groups) == timeless(other.groups)
        assert (one.step, one.policy_version, one.next_position) == (
            *(other.step, other.policy_version, other.next_position),
        )
        assert one.metrics.keys() == other.metrics.keys()
        clocks = ("time/", "rollout/episode_s", "tokens/sampled_per_s", "tools/latency")
        for name, value in one.metrics.items():
            assert name.startswith(clocks) or other.metrics[name] == value, name
    assert any(group.is_informative for group in plain[0].groups + plain[1].groups)


def test_engines_go_on_while_the_trainer_trains() -> None:
    config = single_agent(max_staleness=1)
    policy = MovingPolicy(drawn(1))
    manager = manager_of(config, policy, NUM_ROWS)
    running: list[int] = []

    async def work() -> list[RolloutBatch]:
        batches = []
        for step in range(1, 9):
            batch = await manager.collect(step, policy.version)
            batches.append(batch)
            running.append(policy.num_running)
            await asyncio.sleep(1.0)
            policy.push()
        await manager.close()
        return batches

    batches, end_s = run(work())
    assert policy.num_running == 0, "nothing samples after the end"
    assert sum(running) > 0
    for batch in batches:
        assert versions_of(batch) <= {batch.policy_version - 1, batch.policy_version}
        assert len(batch.groups) == 3
        for name in batch.metrics:
            registry.spec_of(name)
    assert any(len(versions_of(batch)) == 2 for batch in batches)
    assert any(batch.metrics["rollout/continued_generations"] for batch in batches)
    uids = [group.uid for group in all_groups(batches)]
    assert len(set(uids)) == len(uids) == 24
    # The same work in turns takes longer.
    sync = MovingPolicy(drawn(1))
    _, in_turns_s = run(train(manager_of(single_agent(), sync), sync, 8))
    assert end_s < in_turns_s


def test_a_step_takes_what_is_complete_and_orders_it_by_beginning() -> None:
    slow = {"train-1-0.0.p": 9.0, "train-1-1.0.p": 3.0}
    config = single_agent(num_samples=1, max_staleness=2)
    policy = MovingPolicy(lambda conversation: slow.get(conversation, 1.0))
    batches, _ = run(train(manager_of(config, policy, NUM_ROWS), policy, 4))
    uids = [[group.uid for group in batch.groups] for batch in batches]
    assert uids[0] == ["train-1-2", "train-1-3", "train-1-4"]
    assert uids[1] == ["train-1-5", "train-1-6", "train-1-7"]
    # Nothing is newer than 2 versions, so step 3 waits for the last ones of step 1.
    assert uids[2] == ["train-1-0", "train-1-1", "train-1-8"]
    assert batches[2].metrics["rollout/staleness_max"] == 2.0
    assert uids[3] == ["train-2-9", "train-2-10", "train-2-11"] or uids[3][0].startswith("train-2")


@pytest.mark.parametrize(("on_stale", "is_asked_again"), [("refresh", True), ("drop", False)])
def test_a_group_that_is_too_old_is_asked_anew_or_dropped(
    on_stale: str, is_asked_again: bool
) -> None:
    config = single_agent(num_samples=1, max_staleness=1, on_stale=on_stale)
    policy = MovingPolicy(lambda conversation: 40.0 if conversation == "train-1-0.0.p" else 1.0)
    # The first turn of the slow one comes late: its age is seen when it comes.
    manager = manager_of(config, policy, NUM_ROWS)
    batches, _ = run(train(manager, policy, 30))
    row = prompts_from(NUM_ROWS, 1, config.run.seed, 0)[0]
    counted = sum(batch.metrics[f"rollout/{on_stale}ed_groups".replace("drop", "dropp")]
                  for batch in batches)  # fmt: skip
    assert counted == 1.0
    for batch in batches:
        assert min(versions_of(batch)) >= batch.policy_version - 1
        assert batch.metrics["rollout/staleness_max"] <= 1.0
    handed = all_groups(batches)
    assert "train-1-0" not in {group.uid for group in handed}
    saved = manager.in_flight(30)
    assert saved is not None
    expected = asked_in_order(config, saved.next_position)
    if not is_asked_again:
        expected[row] -= 1
    assert Counter(rows_of([*handed, *saved.groups])) == expected


def test_what_is_known_to_be_too_old_is_not_sampled_to_its_end() -> None:
    """Several short turns: the first one tells the age long before the episode ends."""
    config = single_agent(num_samples=1, max_staleness=1, on_stale="drop")
    turns: dict[str, int] = {}

    def answer(conversation: str) -> str:
        turns[conversation] = turns.get(conversation, 0) + 1
        if conversation == "train-1-0.0.p":
            return '<use_mcp_tool>\n<server_name>web</server_name>\n<tool_name>search</tool_name>\n<arguments>\n{"q": "it"}\n</arguments>\n</use_mcp_tool>'  # noqa: E501
        return "It is \\boxed{Ada}"

    policy = MovingPolicy(lambda c: 2.5 if c == "train-1-0.0.p" else 1.0, answer)
    batches, _ = run(train(manager_of(config, policy, NUM_ROWS), policy, 8))
    assert sum(batch.metrics["rollout/dropped_groups"] for batch in batches) == 1.0
    assert turns["train-1-0.0.p"] < 4, "it was not played to max_turns"


def test_over_sampling_without_staleness_ends_the_rest_and_asks_it_first() -> None:
    config = single_agent(num_samples=1, over_sample=0.5)
    policy = MovingPolicy(lambda conversation: 9.0 if conversation == "train-1-1.0.p" else 1.0)
    manager = manager_of(config, policy, NUM_ROWS)
    running: list[int] = []

    async def work() -> list[RolloutBatch]:
        batches = []
        for step in range(1, 4):
            batches.append(await manager.collect(step, policy.version))
            running.append(policy.num_running)
            policy.push()
        return batches

    batches, _ = run(work())
    order = prompts_from(NUM_ROWS, 9, config.run.seed, 0)
    assert running == [0, 0, 0], "engines are idle while the trainer trains"
    assert [batch.metrics["rollout/ended_groups"] for batch in batches] == [2.0, 2.0, 2.0]
    assert rows_of(batches[0].groups) == [order[0], order[2], order[3]]
    assert rows_of(batches[1].groups)[:2] == [order[1], order[4]]
    assert batches[0].next_position == 5 and batches[1].next_position == 8
    assert all(versions_of(batch) == {batch.policy_version} for batch in batches)


def test_over_sampling_with_staleness_carries_the_rest_over() -> None:
    config = single_agent(num_samples=1, max_staleness=1, over_sample=1.0)
    policy = MovingPolicy(drawn(5))
    batches, _ = run(train(manager_of(config, policy, NUM_ROWS), policy, 6))
    # Begun and not handed over: 2 x 3 + 3, of which a step takes 3.
    assert {batch.metrics["rollout/in_flight_groups"] for batch in batches} == {6.0}
    assert batches[0].next_position == 9


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


def test_failures_count_where_groups_are_handed_over() -> None:
    config = single_agent(
        num_samples=1, max_staleness=1, max_failed_frac=0.4, max_episode_retries=0
    )

    class Failing(MovingPolicy):
        async def sample(self, ids: Sequence[int], max_tokens: int, conversation_id: str) -> Any:
            if conversation_id in ("train-1-0.0.p", "train-1-3.0.p", "train-1-4.0.p"):
                await asyncio.sleep(0.5)
                raise EngineRejected("down")
            return await super().sample(ids, max_tokens, conversation_id)

    policy = Failing(lambda conversation: 1.0)
    manager = manager_of(config, policy, NUM_ROWS)
    with pytest.raises(RolloutError, match="2 of 3 episodes failed outside the model"):
        run(manager.collect(1, 0))


def test_uninformative_groups_make_way_while_the_step_is_open() -> None:
    config = single_agent(max_staleness=1, dynamic_sampling=True)
    always = ("train-1-0", "train-1-1")

    def answer(conversation: str) -> str:
        same = conversation.startswith(always)
        right = same or conversation.partition(".")[2].startswith("0")
        return "It is \\boxed{Ada}" if right else "It is \\boxed{Bob}"

    policy = MovingPolicy(lambda conversation: 1.0, answer)
    batches, _ = run(train(manager_of(config, policy, NUM_ROWS), policy, 3))
    assert all(group.is_informative for group in all_groups(batches))
    assert batches[0].metrics["rollout/discarded_groups"] == 2.0
    assert batches[0].next_position == 8


def test_deadlines_hold_across_steps_and_pushes() -> None:
    """The clock of an episode runs on while steps end and weights change."""
    config = single_agent(
        num_samples=1, max_staleness=3, episode_timeout_s=4.5, max_episode_retries=0
    )
    config = replace(config, rollout=replace(config.rollout, max_failed_frac=0.5))
    policy = MovingPolicy(lambda conversation: 50.0 if conversation == "train-1-0.0.p" else 1.0)
    manager = manager_of(config, policy, NUM_ROWS)
    batches, end_s = run(train(manager, policy, 6))
    (late,) = [e for group in all_groups(batches) for e in group.episodes if e.failure]
    assert late.id == "train-1-0.0" and late.failure.startswith("deadline: no end after 4.5 s")
    assert late.reward is None
    step = next(batch for batch in batches if batch.metrics["rollout/failed"])
    assert step.step > 1 and end_s < 50


def test_asked_twice_at_the_same_time_a_step_is_handed_over_once() -> None:
    config = single_agent(max_staleness=1)
    policy = MovingPolicy(drawn(2))
    manager = manager_of(config, policy, NUM_ROWS)

    async def work() -> None:
        first, second = await asyncio.gather(manager.collect(1, 0), manager.collect(1, 0))
        assert first is second
        await manager.close()

    run(work())


def test_a_traced_step_has_what_ended_since_the_step_before(tmp_path: Path) -> None:
    config = single_agent(num_samples=1, max_staleness=1)
    config = replace(
        config,
        run=replace(config.run, dir=str(tmp_path), steps=3),
        obs=replace(config.obs, trace_every=1),
    )
    policy = MovingPolicy(drawn(2))
    manager = manager_of(config, policy, NUM_ROWS)

    async def work() -> list[RolloutBatch]:
        batches = await train(manager, policy, 3)
        await manager.close()
        return batches

    batches, _ = run(work())
    run_dir = Path(config.run_dir)
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s and len(spans_by_step(run_dir)) < 9:
        time.sleep(0.05)
    found = spans_by_step(run_dir)
    assert traced_steps(run_dir) == [1, 2, 3]
    for batch in batches:
        for group in batch.groups:
            assert found[group.episodes[0].id] <= batch.step


def spans_by_step(run_dir: Path) -> dict[str, int]:
    """Episode -> the step in whose trace it is."""
    return {
        span.unit: step
        for step in traced_steps(run_dir)
        for file in read_spans(run_dir, step)
        for span in file.spans
        if span.name == "episode"
    }
