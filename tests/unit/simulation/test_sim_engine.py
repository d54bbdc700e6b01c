"""The engine's model against closed forms, and what it must never do, whatever is asked of it.

Not proved here: that real engines behave like the model (benchmarks/simulate.py compares).
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_matpo.simulation.engine import NEVER, Engine, EngineRates, Request, Segment
from tests.helpers.alone import alone_s

PLAIN = EngineRates(overhead_s=0.01, per_sequence_s=0.002, prefill_base_s=0.1, prefill_token_s=1e-3)
ROOF = EngineRates(overhead_s=0.002, weights_s=0.01, kv_s=1e-6, compute_s=4e-4)


def play(engine: Engine, arrivals: list[tuple[float, Request]]) -> dict:
    """Run to the end; returns when each owner's generation ended."""
    left, ends = sorted(arrivals, key=lambda item: item[0]), {}
    while left or engine.next_event != NEVER:
        if left and left[0][0] <= engine.next_event:
            now, request = left.pop(0)
            engine.submit(now, request)
            continue
        now = engine.next_event
        for owner in engine.fire(now):
            ends[owner] = now
    return ends


def test_one_sequence_alone_takes_prefill_and_one_step_per_further_token():
    engine = Engine(PLAIN, 8, 10_000)
    (end,) = play(engine, [(3.0, Request("a", 50, 21, 50))]).values()
    assert end == pytest.approx(3.0 + 0.1 + 50e-3 + 20 * 0.012)
    assert engine.usage.prefill_s == pytest.approx(0.15)
    assert engine.usage.decode_s == pytest.approx(20 * 0.012)
    assert engine.usage.num_tokens == 21


def test_a_single_token_needs_no_step():
    engine = Engine(PLAIN, 8, 10_000)
    assert play(engine, [(0.0, Request("a", 10, 1, 10))])["a"] == pytest.approx(0.11)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_equal_sequences_share_every_step_and_end_together(size):
    engine = Engine(PLAIN, 64, 1_000_000)
    ends = play(engine, [(0.0, Request(i, 10, 101, 10)) for i in range(size)])
    # The first is alone in a prefill; the others arrive during it and have the next.
    prefills = 0.11 + (0.1 + 0.01 * (size - 1) if size > 1 else 0.0)
    assert max(ends.values()) == pytest.approx(prefills + 100 * (0.01 + 0.002 * size))
    assert len(set(ends.values())) == 1
    assert engine.usage.sequence_s == pytest.approx(size * engine.usage.decode_s)


def test_more_than_the_engine_takes_goes_in_waves():
    """Saturation: with at most 4 at a time, 12 equal ones take three times as long as 4."""
    rates = EngineRates(overhead_s=0.01, per_sequence_s=0.002)
    ends = play(Engine(rates, 4, 10**6), [(0.0, Request(i, 10, 101, 1)) for i in range(12)])
    wave = 100 * (0.01 + 4 * 0.002)
    assert sorted(ends.values()) == pytest.approx([wave] * 4 + [2 * wave] * 4 + [3 * wave] * 4)


def test_the_cache_limits_like_the_number_of_sequences():
    rates = EngineRates(overhead_s=0.01, per_sequence_s=0.002)
    ends = play(Engine(rates, 64, 3 * 111), [(0.0, Request(i, 10, 101, 1)) for i in range(6)])
    wave = 100 * (0.01 + 3 * 0.002)
    assert sorted(ends.values()) == pytest.approx([wave] * 3 + [2 * wave] * 3)


def test_a_queue_with_constant_service_waits_as_the_lindley_recursion_says():
    """One place, constant service, any arrivals: W(n+1) = max(0, W(n) + S - gap)."""
    rates = EngineRates(overhead_s=0.01)
    gaps = [0.3, 0.05, 0.2, 1.7, 0.01, 0.01, 0.4, 0.9]
    service, wait, now, arrivals, expected = 0.5, 0.0, 0.0, [], {}
    for index, gap in enumerate(gaps):
        if index:
            wait = max(0.0, wait + service - gap)
        now += gap
        arrivals.append((now, Request(index, 10, 51, 1)))
        expected[index] = now + wait + service
    assert play(Engine(rates, 1, 10**6), arrivals) == pytest.approx(expected)


def test_a_prefill_stops_decoding():
    engine = Engine(PLAIN, 8, 10_000)
    ends = play(engine, [(0.0, Request("a", 10, 101, 10)), (0.5, Request("b", 200, 1, 200))])
    assert ends["b"] == pytest.approx(0.5 + 0.1 + 0.2)
    assert ends["a"] == pytest.approx(0.11 + 100 * 0.012 + 0.3)


def test_a_pause_stops_everything_once():
    engine = Engine(PLAIN, 8, 10_000)
    engine.submit(0.0, Request("a", 10, 101, 10))
    engine.fire(engine.next_event)
    engine.pause(0.6, 2.0)
    end = 0.0
    while engine.next_event != NEVER:
        end = engine.next_event
        engine.fire(end)
    assert end == pytest.approx(0.11 + 1.2 + 2.0)
    assert engine.usage.paused_s == 2.0


def test_steps_below_the_clocks_resolution_end():
    engine = Engine(EngineRates(overhead_s=1e-12), 8, 10_000)
    ends = play(engine, [(1e6, Request(i, 10, 50 + i, 1)) for i in range(3)])
    assert set(ends.values()) == {1e6}


def test_a_growing_context_costs_what_the_sum_over_steps_costs():
    """The integral against the sum of discrete steps, through the roofline's crossing."""
    for size, context in ((1, 1000), (40, 60_000), (40, 200)):
        steps = 2000
        total = sum(ROOF.step_s(size, context + size * (i + 0.5)) for i in range(steps))
        assert Segment(ROOF, size, context).seconds(steps) == pytest.approx(total, rel=1e-6)


@given(
    size=st.integers(1, 200),
    context=st.integers(0, 500_000),
    steps=st.floats(0, 40_000),
    rates=st.sampled_from([PLAIN, ROOF, EngineRates(overhead_s=0.01, kv_s=1e-7)]),
)
def test_seconds_and_steps_are_inverse(size, context, steps, rates):
    segment = Segment(rates, size, context)
    assert segment.steps(segment.seconds(steps)) == pytest.approx(steps, rel=1e-9, abs=1e-9)


def test_a_table_of_rates_is_met_at_its_rows_and_linear_between():
    rates = EngineRates(table=((1, 0.010), (16, 0.025), (64, 0.080)))
    assert [rates.step_s(b, 0) for b in (1, 16, 64)] == [0.010, 0.025, 0.080]
    assert rates.step_s(40, 0) == pytest.approx((0.025 + 0.080) / 2)
    assert rates.step_s(112, 0) == pytest.approx(0.135)
    assert EngineRates(table=((8, 0.02),)).step_s(30, 0) == 0.02


def test_experts_are_read_as_far_as_they_are_used():
    rates = EngineRates(weights_s=0.01, experts_s=1.0, expert_share=0.25)
    assert rates.step_s(1, 0) == pytest.approx(0.26)
    assert rates.step_s(2, 0) == pytest.approx(0.01 + 1 - 0.75**2)
    assert rates.step_s(500, 0) == pytest.approx(1.01)


REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 5), st.integers(1, 300), st.integers(1, 200), st.floats(0, 1)
    ),
    min_size=1, max_size=40,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    asked=REQUESTS,
    max_running=st.integers(1, 8),
    kv_tokens=st.integers(500, 3000),
    rates=st.sampled_from([PLAIN, ROOF]),
)
def test_nothing_is_lost_and_no_limit_is_passed(asked, max_running, kv_tokens, rates):
    arrivals = [
        (when, Request(i, context, tokens, max(1, round(new * context))))
        for i, (when, context, tokens, new) in enumerate(asked)
    ]
    engine = Engine(rates, max_running, kv_tokens)
    ends = play(engine, arrivals)
    usage = engine.usage
    assert ends.keys() == {request.owner for _, request in arrivals}
    assert usage.num_tokens == sum(request.num_tokens for _, request in arrivals)
    assert usage.prefill_tokens == sum(request.new_tokens for _, request in arrivals)
    assert usage.max_running <= max_running
    assert usage.max_kv_tokens <= kv_tokens
    assert engine.num_requests == 0
    # Every sequence runs one step per token after its first.
    for when, request in arrivals:
        alone = alone_s(rates, request.context_tokens, request.num_tokens, request.new_tokens)
        assert ends[request.owner] - when >= alone * (1 - 1e-6) - 1e-6
    span = max(ends.values()) - min(when for when, _ in arrivals)
    assert usage.decode_s + usage.prefill_s <= span * (1 + 1e-9)
    # No step can hold more than `max_running`, so there is a least time for all tokens.
    steps = sum(request.num_tokens - 1 for _, request in arrivals) / max_running
    assert usage.decode_s >= steps * rates.step_s(1, 0) * (1 - 1e-6) - 1e-6
