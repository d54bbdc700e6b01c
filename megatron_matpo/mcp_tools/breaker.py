"""Circuit breaker of one tool server: a state machine without clock, task or lock of its own.

* closed: calls are sent; after `failures` failed ones in a row it opens;
* open: none is sent; after `reset_s` one trial call is;
* the trial succeeds: closed; it fails: open for another `reset_s`.
"""

from __future__ import annotations

from collections.abc import Callable


class Breaker:
    """Says whether a call may be sent; is told how each call that was sent ended.

    Calls that were sent before it opened may still report: a success closes it whenever it comes, a
    failure while it is open changes nothing, and one during a trial is taken for the trial's.
    """

    def __init__(self, failures: int, reset_s: float, now: Callable[[], float]) -> None:
        """`failures` 0 never opens; `now` is a monotonic clock in seconds."""
        self.num_opened = 0
        """How often it went from closed to open."""
        self._limit = failures
        self._reset_s = reset_s
        self._now = now
        self._failures = 0
        self._opened_at: float | None = None
        self._trial_runs = False

    @property
    def is_open(self) -> bool:
        """Calls fail at once, but for trials."""
        return self._opened_at is not None

    def wait_s(self) -> float:
        """Seconds until a call may be sent; 0 now. `reset_s` while a trial call is under way."""
        if self._opened_at is None:
            return 0.0
        if self._trial_runs:
            return self._reset_s
        return max(0.0, self._opened_at + self._reset_s - self._now())

    def try_begin(self) -> bool:
        """Take the permission to send a call; True must be followed by exactly one report."""
        if self.wait_s() > 0:
            return False
        self._trial_runs = self.is_open
        return True

    def succeeded(self) -> None:
        """A call was answered, be it with the tool's own error."""
        self._failures = 0
        self._opened_at = None
        self._trial_runs = False

    def failed(self) -> None:
        """A call failed for reasons of the infrastructure."""
        self._failures += 1
        if self._trial_runs:
            self._trial_runs = False
            self._opened_at = self._now()
        elif self._opened_at is None and 0 < self._limit <= self._failures:
            self.num_opened += 1
            self._opened_at = self._now()

    def abandoned(self) -> None:
        """The caller went away before the call ended; that says nothing about the server."""
        self._trial_runs = False
