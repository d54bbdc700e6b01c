"""Proves the circuit breaker's transitions on a clock of the test's own."""

from __future__ import annotations

from megatron_matpo.mcp_tools.breaker import Breaker


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(3, 30.0, clock)
    for _ in range(3):
        assert breaker.try_begin()
        breaker.failed()
    assert breaker.is_open and breaker.num_opened == 1
    return breaker


def test_only_failures_in_a_row_open_it():
    breaker = Breaker(3, 30.0, Clock())
    for _ in range(5):
        for _ in range(2):
            assert breaker.try_begin()
            breaker.failed()
        breaker.abandoned()
        assert breaker.try_begin()
        breaker.succeeded()
    assert not breaker.is_open and breaker.num_opened == 0


def test_open_it_lets_nothing_through_until_one_trial():
    clock = Clock()
    breaker = opened(clock)
    clock.now_s += 29.0
    assert not breaker.try_begin() and breaker.wait_s() == 1.0
    clock.now_s += 1.0
    assert breaker.wait_s() == 0.0
    assert breaker.try_begin()
    assert not breaker.try_begin() and breaker.wait_s() == 30.0


def test_the_trial_decides():
    clock = Clock()
    breaker = opened(clock)
    clock.now_s += 30.0
    assert breaker.try_begin()
    breaker.failed()
    assert breaker.wait_s() == 30.0 and breaker.num_opened == 1
    clock.now_s += 30.0
    assert breaker.try_begin()
    breaker.succeeded()
    assert not breaker.is_open
    breaker.failed()
    assert not breaker.is_open, "it counts from the beginning"


def test_an_abandoned_trial_makes_room_for_the_next():
    clock = Clock()
    breaker = opened(clock)
    clock.now_s += 30.0
    assert breaker.try_begin()
    breaker.abandoned()
    assert breaker.try_begin()


def test_reports_of_calls_that_were_sent_before_it_opened():
    clock = Clock()
    breaker = opened(clock)
    clock.now_s += 10.0
    breaker.failed()
    assert breaker.wait_s() == 20.0
    breaker.succeeded()
    assert not breaker.is_open


def test_zero_failures_never_open_it():
    breaker = Breaker(0, 30.0, Clock())
    for _ in range(100):
        breaker.failed()
    assert breaker.try_begin() and not breaker.is_open
