"""An event loop on a clock that jumps from event to event."""

from __future__ import annotations

import asyncio


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Its clock stands while anything can run, and then jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        if not self._ready:  # type: ignore[attr-defined]
            timers = self._scheduled  # type: ignore[attr-defined]
            due = [timer.when() for timer in timers if not timer.cancelled()]
            self._now_s = max(self._now_s, min(due, default=self._now_s))
        super()._run_once()  # type: ignore[misc]
