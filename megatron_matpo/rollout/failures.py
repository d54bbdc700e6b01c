"""How many episodes may fail for reasons outside the model before that ends a step."""

from __future__ import annotations

from collections import Counter

from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.errors import RolloutError

_MAX_REASONS = 5
_MAX_REASON_CHARS = 300


class FailureBound:
    """Counts the failures of one step against `rollout.max_failed_frac`."""

    def __init__(self, config: RolloutConfig) -> None:
        """Nothing has failed yet."""
        self._config = config
        self._reasons: Counter[str] = Counter()
        self._num_episodes = self._num_failed = 0

    def expect(self, num_episodes: int) -> None:
        """So many further episodes belong to the step."""
        self._num_episodes += num_episodes

    def count(self, reason: str) -> None:
        """One of them failed.

        Raises:
            RolloutError: more failed than is allowed; names the most frequent reasons.
        """
        self._reasons[reason[:_MAX_REASON_CHARS]] += 1
        self._num_failed += 1
        allowed = self._config.max_failed_frac * self._num_episodes
        if self._num_failed > allowed:
            reasons = "; ".join(
                f"{count} x {reason}" for reason, count in self._reasons.most_common(_MAX_REASONS)
            )
            more = len(self._reasons) - _MAX_REASONS
            raise RolloutError(
                f"{self._num_failed} of {self._num_episodes} episodes failed outside the model, "
                f"each after {self._config.max_episode_retries} retries; "
                f"rollout.max_failed_frac={self._config.max_failed_frac:g} allows "
                f"{int(allowed)}: {reasons}" + (f"; and {more} other reasons" if more > 0 else "")
            )
