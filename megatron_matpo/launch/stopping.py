"""What signals mean to a supervised run.

| signal                                   | the run                         | exit code |
|------------------------------------------|---------------------------------|-----------|
| SIGUSR1; SIGTERM with `run.save_on_stop` | saves a checkpoint and ends     | 75        |
| SIGTERM, SIGHUP                          | stops                           | 143       |
| SIGINT (Ctrl-C)                          | stops                           | 130       |

A run that does not save inside `run.save_timeout_s` has failed (exit code 1).
A run that has nothing to save (an evaluation, or one that is still starting) stops at once with 75.
While it saves, a further SIGUSR1 is nothing new; any other signal stops it at once. Whatever was
saved before, the same command goes on from there.
Before there is a supervisor: `raise_on_signal`.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# A scheduler that signals every process of a job reaches the guard and the supervisor, to which the
# guard passes it on: one request, not two.
_ECHO_S = 3.0
STOPPED_EARLY = 75
"""Exit code: ended early on request; the same command goes on (EX_TEMPFAIL of sysexits.h)."""


class StoppedEarly(BaseException):
    """Asked to end before anything had started; no handler of errors may swallow it."""


def raise_on_signal() -> None:
    """Have SIGUSR1 and SIGTERM raise `StoppedEarly`, until a guard takes them over (main thread).

    By default they would end the process without a word, and look like a crash.
    """

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise StoppedEarly(signal.Signals(signal_number).name)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, stop)


class StopSignals:
    """Collects the signals of one process."""

    def __init__(self, *, save_on_stop: bool) -> None:
        """`install` makes it listen."""
        self._saving = {signal.SIGUSR1, signal.SIGTERM} if save_on_stop else {signal.SIGUSR1}
        self._seen: list[int] = []
        self._times: dict[int, float] = {}

    def install(self) -> None:
        """Handle and unblock all of `SIGNALS` (main thread)."""
        for number in SIGNALS:
            # Under nohup SIGHUP is ignored, and stays so.
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:
                signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    @property
    def first_name(self) -> str:
        """Name of the first signal, for people."""
        return "Ctrl-C" if self._seen[0] == signal.SIGINT else signal.Signals(self._seen[0]).name

    @property
    def wants_save(self) -> bool:
        """Save, then end."""
        return bool(self._seen) and self._seen[0] in self._saving

    @property
    def wants_stop(self) -> bool:
        """End now: a signal that does not ask for a save, or a second, different request."""
        return any(
            number not in self._saving or (place > 0 and number != signal.SIGUSR1)
            for place, number in enumerate(self._seen)
        )

    @property
    def in_a_hurry(self) -> bool:
        """More than one signal that stops: do not wait for anybody."""
        return sum(number != signal.SIGUSR1 for number in self._seen) > 1

    @property
    def exit_code(self) -> int:
        """Of a run that was stopped, not saved."""
        return 130 if self._seen[0] == signal.SIGINT else 143

    def _on_signal(self, signal_number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_echo = now - self._times.get(signal_number, -_ECHO_S) < _ECHO_S
        self._times[signal_number] = now
        if not (is_echo and signal_number in self._saving):
            self._seen.append(signal_number)
