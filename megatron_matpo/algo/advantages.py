"""GRPO advantages over episode trees: one scalar per planner, inherited by its workers.

Source: MATPO, arXiv:2510.04678, and GRPO, arXiv:2402.03300 (group-relative advantage).
Differs from the MATPO code (`verl/protocol.py`, `core_algos.py`), on purpose; `algo/reference.py`
has that code's numbers:

* workers inherit the planner's scalar and use their own loss mask, where the code copied the
  planner's token row, mask included;
* a group whose rewards are all equal gets exactly 0, where float32 rounding over the epsilon gave
  values up to 0.06;
* a group with a single trainable episode gets 0: it has no baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from megatron_matpo.types import Group

STD_EPSILON = 1e-6
"""Added to the standard deviation (MATPO `core_algos.py`, stock veRL)."""

GroupRule = Callable[[Sequence[float]], list[float]]
"""[G] rewards of a prompt group's trainable episodes -> [G] advantages."""


def group_advantages(
    rewards: Sequence[float], *, normalize_std: bool, baseline: str = "group_mean"
) -> list[float]:
    """Advantages of one prompt group, in float64.

    Source: GRPO, arXiv:2402.03300, Sec. 4.1.2; without the division Dr. GRPO, arXiv:2503.20783;
    `leave_one_out` is RLOO, arXiv:2402.14740, which does not divide either.

    Args:
        rewards: [G] total rewards of the group's trainable episodes.
        normalize_std: divide by the unbiased standard deviation plus `STD_EPSILON`.
        baseline: what is subtracted: `group_mean`, or `leave_one_out`, the mean of the group's
            other episodes; the difference is the same times G / (G - 1).

    Returns:
        [G] values that sum to 0; all exactly 0 when the rewards are equal.
    """
    if len(rewards) < 2 or max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    total = math.fsum(rewards)
    mean = total / len(rewards)
    centered = [reward - mean for reward in rewards]
    variance = math.fsum(value * value for value in centered) / (len(rewards) - 1)
    if baseline == "leave_one_out":
        others = len(rewards) - 1
        centered = [reward - (total - reward) / others for reward in rewards]
    if not normalize_std:
        return centered
    return [value / (math.sqrt(variance) + STD_EPSILON) for value in centered]


def episode_advantages(
    groups: Sequence[Group], rule: GroupRule, *, scale: float = 1.0
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
        values = rule([total for _, total in scored])
        result.update({key: scale * value for (key, _), value in zip(scored, values, strict=True)})
    return result


def num_uninformative_groups(groups: Sequence[Group]) -> int:
    """Groups that contribute no gradient: equal rewards, or fewer than two trainable episodes."""
    return sum(not group.is_informative for group in groups)
