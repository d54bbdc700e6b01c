"""GRPO advantages over episode trees: one scalar per planner, inherited by its workers.

Source: MATPO, arXiv:2510.04678, and GRPO, arXiv:2402.03300 (group-relative advantage).
Differs from the MATPO code (`verl/protocol.py`, `core_algos.py`), on purpose:

* workers inherit the planner's scalar and use their own loss mask, where the code copied the
  planner's token row, mask included;
* a group whose rewards are all equal gets exactly 0, where float32 rounding over the epsilon gave
  values up to 0.06;
* a group with a single trainable episode gets 0: it has no baseline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_matpo.types import Group

STD_EPSILON = 1e-6
"""Added to the standard deviation (MATPO `core_algos.py`, stock veRL)."""


def group_advantages(rewards: Sequence[float], *, normalize_std: bool) -> list[float]:
    """Advantages of one prompt group, in float64.

    Args:
        rewards: [G] total rewards of the group's trainable episodes.
        normalize_std: divide by the unbiased standard deviation plus `STD_EPSILON`.

    Returns:
        [G] values that sum to 0; all exactly 0 when the rewards are equal.
    """
    if len(rewards) < 2 or max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    centered = [reward - mean for reward in rewards]
    if not normalize_std:
        return centered
    variance = math.fsum(value * value for value in centered) / (len(rewards) - 1)
    return [value / (math.sqrt(variance) + STD_EPSILON) for value in centered]


def episode_advantages(
    groups: Sequence[Group], *, normalize_std: bool, scale: float = 1.0
) -> dict[str, float]:
    """Advantage of every trainable episode (those with a reward), by episode id.

    Workers are not in the statistics: a question's baseline does not depend on how many workers
    its planners spawned. `scale` multiplies the result (0 is a control experiment).
    """
    result: dict[str, float] = {}
    for group in groups:
        scored = [
            (item.id, item.reward.total) for item in group.episodes if item.reward is not None
        ]
        values = group_advantages([total for _, total in scored], normalize_std=normalize_std)
        result.update({key: scale * value for (key, _), value in zip(scored, values, strict=True)})
    return result


def num_uninformative_groups(groups: Sequence[Group]) -> int:
    """Groups that contribute no gradient: equal rewards, or fewer than two trainable episodes."""
    count = 0
    for group in groups:
        totals = [item.reward.total for item in group.episodes if item.reward is not None]
        count += len(totals) < 2 or max(totals) == min(totals)
    return count
