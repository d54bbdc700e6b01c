"""Trees of episodes on a fleet: bounds that hold for all of them, and cases with a known answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_matpo.simulation.engine import EngineRates
from megatron_matpo.simulation.episodes import Agent, Turn, agents_of, all_agents, critical_path_s
from megatron_matpo.simulation.placements import rollout_times
from megatron_matpo.simulation.rollout import Fleet, Rollout, run_step
from tests.helpers.alone import alone_s

RATES = EngineRates(overhead_s=0.01, per_sequence_s=0.001, prefill_base_s=0.02, request_s=0.005)


def alone(context: int, tokens: int) -> float:
    """A generation with everything but one token in the cache."""
    return alone_s(RATES, context, tokens, 1)


def worker(num_tokens: int, tool_s: float) -> Agent:
    return Agent(20, (Turn(num_tokens, (tool_s,), (), 30), Turn(5)))


def test_one_episode_takes_its_critical_path():
    episode = Agent(30, (Turn(11, (), (worker(21, 0.7), worker(3, 0.1)), 40), Turn(6)))
    fleet = Fleet(2, RATES, 8, 10_000)
    done = run_step(fleet, [episode]).steps[1].done
    # The two workers are on engines of their own: nothing waits for anything else.
    first = 0.025 + 10 * 0.011
    slow = (0.025 + 20 * 0.011) + 0.7 + (0.025 + 4 * 0.011)
    last = 0.025 + 5 * 0.011
    assert done == pytest.approx(first + slow + last)
    assert done == pytest.approx(critical_path_s(episode, alone, RATES.request_s))


def test_equal_episodes_on_equal_engines_have_no_tail():
    fleet = Fleet(4, RATES, 64, 10**6)
    times = rollout_times(run_step(fleet, [Agent(10, (Turn(50),))] * 32))
    assert times.tail_s == pytest.approx(0.0, abs=1e-9)
    assert times.last_tenth_s == pytest.approx(0.0, abs=1e-9)
    assert times.max_running == 8


def test_one_straggler_leaves_the_other_engines_idle():
    fleet = Fleet(4, EngineRates(overhead_s=0.01), 64, 10**6)
    episodes = [Agent(10, (Turn(1001 if i == 0 else 101),)) for i in range(4)]
    times = rollout_times(run_step(fleet, episodes))
    assert times.decode_s == pytest.approx((10 + 3 * 1) / 4)
    assert times.tail_s == pytest.approx(3 * 9 / 4)
    assert times.last_tenth_s == pytest.approx(0.0)


def test_tools_are_waited_for_and_queue():
    fleet = Fleet(1, EngineRates(overhead_s=0.01), 64, 10**6, tool_slots=2)
    episodes = [Agent(10, (Turn(1, (1.0,), (), 5), Turn(101)))] * 6
    rollout = run_step(fleet, episodes)
    assert rollout.steps[1].done == pytest.approx(3.0 + 1.0)
    times = rollout_times(rollout)
    assert times.tool_queue_s == pytest.approx((0 + 0 + 1 + 1 + 2 + 2) / 6)
    assert times.wait_s == pytest.approx(1.0), "the first calls; then the engine decodes"
    assert times.decode_s == pytest.approx(3.0)


def test_the_gate_lets_episodes_in_one_after_another():
    fleet = Fleet(2, EngineRates(overhead_s=0.01), 64, 10**6, max_concurrent=1)
    rollout = run_step(fleet, [Agent(10, (Turn(101),))] * 3)
    assert rollout.steps[1].ends == pytest.approx([1.0, 2.0, 3.0])
    assert list(rollout.steps[1].durations.values()) == pytest.approx([1.0] * 3)


def test_verdicts_are_waited_for_outside_of_an_episodes_place():
    fleet = Fleet(1, EngineRates(overhead_s=0.01), 64, 10**6, max_concurrent=1, judge_slots=1)
    rollout = run_step(fleet, [Agent(10, (Turn(101),))] * 3, [5.0, 5.0, 5.0])
    assert rollout.steps[1].ends == pytest.approx([6.0, 11.0, 16.0])
    assert sum(rollout.steps[1].durations.values()) == pytest.approx(3.0)
    assert rollout_times(rollout).tail_s == pytest.approx(13.0)


@pytest.mark.parametrize(("hit", "new_tokens"), [(1.0, 10 + 30), (0.0, 10 + (10 + 20 + 30))])
def test_what_the_prefix_cache_has_is_not_computed_again(hit, new_tokens):
    fleet = Fleet(1, RATES, 8, 10_000, prefix_hit=hit)
    rollout = run_step(fleet, [Agent(10, (Turn(20, (0.1,), (), 30), Turn(5)))])
    assert rollout.usages[0].prefill_tokens == new_tokens
    assert rollout.max_open_tokens == 10 + 20 + 30 + 5


def test_conversations_go_to_the_least_loaded_engine_and_stay_there():
    fleet = Fleet(3, RATES, 8, 10**6)
    episodes = [Agent(10, (Turn(10, (0.2,), (), 5), Turn(10)))] * 9
    rollout = run_step(fleet, episodes)
    assert [usage.num_tokens for usage in rollout.usages] == [60, 60, 60]


def test_steps_that_overlap_are_told_apart():
    fleet = Fleet(1, EngineRates(overhead_s=0.01), 64, 10**6)
    told = []
    rollout = Rollout(fleet, lambda step, now: told.append((step, round(now, 6))))
    rollout.release(0.0, 1, [Agent(10, (Turn(301),)), Agent(10, (Turn(101),))])
    rollout.at(0.5, lambda now: rollout.release(now, 2, [Agent(10, (Turn(101),))]))
    rollout.run()
    assert told == [(2, 1.5), (1, 3.0)]


LEAF = st.builds(
    Turn, st.integers(1, 60), st.lists(st.floats(0, 2), max_size=2).map(tuple), st.just(()),
    st.integers(1, 40),
)  # fmt: skip
WORKER = st.builds(Agent, st.integers(1, 50), st.lists(LEAF, min_size=1, max_size=3).map(tuple))
PLANNER = st.builds(
    Agent,
    st.integers(1, 50),
    st.lists(
        st.builds(
            Turn, st.integers(1, 60), st.lists(st.floats(0, 2), max_size=1).map(tuple),
            st.lists(WORKER, max_size=2).map(tuple), st.integers(1, 40),
        ),
        min_size=1, max_size=3,
    ).map(tuple),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    episodes=st.lists(PLANNER, min_size=1, max_size=20),
    num_engines=st.integers(1, 4),
    max_running=st.integers(1, 6),
    max_concurrent=st.integers(1, 30),
    tool_slots=st.integers(1, 5),
)
def test_bounds_of_every_rollout(episodes, num_engines, max_running, max_concurrent, tool_slots):
    fleet = Fleet(num_engines, RATES, max_running, 2000, max_concurrent, tool_slots)
    rollout = run_step(fleet, episodes)
    record, usages, agents = rollout.steps[1], rollout.usages, all_agents(episodes)
    assert len(record.ends) == len(record.durations) == len(episodes)
    assert sum(usage.num_tokens for usage in usages) == sum(agent.num_sampled for agent in agents)
    assert all(usage.max_running <= max_running for usage in usages)
    assert all(usage.max_kv_tokens <= 2000 for usage in usages)
    calls = [s for agent in agents for turn in agent.turns for s in turn.tools_s]
    assert rollout.tools.num_jobs == len(calls)
    # No faster than any single episode could be, ...
    paths = [critical_path_s(episode, alone, RATES.request_s) for episode in episodes]
    slack = 1e-6 * len(agents) + 1e-9
    for index, path in enumerate(paths):
        assert record.durations[index] >= path * (1 - 1e-6) - slack
    # ... nor than all engines, or all tool servers, can do all of the work.
    assert record.done * num_engines >= sum(u.decode_s + u.prefill_s for u in usages) - slack
    assert record.done * tool_slots >= sum(calls) - slack
    least = RATES.overhead_s / max_running + RATES.per_sequence_s
    tokens = sum(turn.num_tokens - 1 for agent in agents for turn in agent.turns)
    assert record.done * num_engines >= tokens * least * (1 - 1e-6) - slack
    # And no slower than everything after everything else.
    per_turn = RATES.request_s + 2 * RATES.prefill_base_s
    everything = sum(calls) + sum(
        per_turn + turn.num_tokens * RATES.step_s(1, 0) for agent in agents for turn in agent.turns
    )
    assert record.done <= everything * max_running + slack
    times = rollout_times(rollout)
    parts = times.decode_s + times.prefill_s + times.wait_s + times.tail_s
    assert parts == pytest.approx(record.done)


@settings(max_examples=20, deadline=None)
@given(st.lists(PLANNER, min_size=1, max_size=12), st.integers(1, 3))
def test_the_same_twice(episodes, num_engines):
    fleet = Fleet(num_engines, RATES, 4, 2000, tool_slots=2)
    first, second = run_step(fleet, episodes), run_step(fleet, episodes)
    assert first.steps[1].ends == second.steps[1].ends
    assert first.usages == second.usages


def test_contexts_are_counted_as_the_recorder_counts_them():
    episode = Agent(30, (Turn(11, (), (worker(21, 0.7),), 40), Turn(6, (), (), 99)))
    assert [agent.num_tokens for agent in agents_of(episode)] == [87, 76]
    assert episode.num_sampled == 17
