"""What sequences of signals ask of a run."""

from __future__ import annotations

from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1

import pytest

from megatron_matpo.launch.stopping import StopSignals


def after(*numbers: int, save_on_stop: bool) -> StopSignals:
    signals = StopSignals(save_on_stop=save_on_stop)
    for number in numbers:
        signals._on_signal(number, None)
        signals._times.clear()  # the next one comes much later
    return signals


@pytest.mark.parametrize(
    ("numbers", "save_on_stop", "saves", "stops", "hurries"),
    [
        ((), False, False, False, False),
        ((SIGTERM,), False, False, True, False),
        ((SIGTERM,), True, True, False, False),
        ((SIGUSR1,), False, True, False, False),
        ((SIGUSR1, SIGUSR1), False, True, False, False),
        ((SIGUSR1, SIGTERM), True, True, True, False),
        ((SIGTERM, SIGUSR1), True, True, False, False),
        ((SIGTERM, SIGTERM), True, True, True, True),
        ((SIGINT,), True, False, True, False),
        ((SIGINT, SIGINT), False, False, True, True),
        ((SIGHUP,), True, False, True, False),
        ((SIGUSR1, SIGINT), False, True, True, False),
    ],
)
def test_signals(numbers, save_on_stop, saves, stops, hurries):
    signals = after(*numbers, save_on_stop=save_on_stop)
    assert (signals.wants_save, signals.wants_stop) == (saves, stops)
    assert signals.in_a_hurry == hurries


def test_names_and_exit_codes():
    assert after(SIGINT, save_on_stop=False).exit_code == 130
    assert after(SIGTERM, save_on_stop=False).exit_code == 143
    assert after(SIGINT, save_on_stop=False).first_name == "Ctrl-C"
    assert after(SIGUSR1, save_on_stop=False).first_name == "SIGUSR1"


def test_a_signal_that_comes_by_two_ways_is_one():
    signals = StopSignals(save_on_stop=True)
    signals._on_signal(SIGTERM, None)
    signals._on_signal(SIGTERM, None)
    assert signals.wants_save and not signals.wants_stop
    impatient = StopSignals(save_on_stop=True)
    impatient._on_signal(SIGINT, None)
    impatient._on_signal(SIGINT, None)
    assert impatient.in_a_hurry, "a person who presses Ctrl-C twice means it"
