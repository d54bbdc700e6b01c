"""An episode's reward: accuracy of the answer and well-formedness of its tool calls.

Source: MATPO original, `verl/workers/reward_manager/subagent_tool.py` and `tool.py`. Both forms
read what the call grammar made of each call; there is no second parser.

* Corrected (`compat: corrected`): format is the mean over the trajectories that exist, or with
  `reward.worker_format_share` the planner's and the mean over its workers in that proportion; a
  trajectory's is the share of its calls that are well formed.
* Reference (`compat: reference`, defect C10): format is 0.5 * (planner + mean over workers), with 0
  for a planner that has no workers, so that not delegating costs half of the format reward; only
  complete call blocks count, so that an unclosed block or a native `<tool_call>` costs nothing; a
  planner that cannot delegate is scored by its own calls alone.
  Differs from the original: calls inside `<think>`, in a final summary or in a turn that was cut
  by length count for nothing (there, like any other); a closing tag that closes nothing counts as a
  wrong block (there, for nothing).

In either form an episode that failed for reasons outside the model gets no reward, instead of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_matpo.agents.grammar import CallOutcome, format_score
from megatron_matpo.config.reward import RewardConfig
from megatron_matpo.types import Reward, Role, Trajectory

_DIGITS = 12
# Not a complete block of the original's format, which it does not look at.
_UNSEEN_BY_REFERENCE = frozenset({CallOutcome.UNCLOSED, CallOutcome.FOREIGN_SYNTAX})


def episode_format(trajectories: Sequence[Trajectory], worker_share: float = -1.0) -> float:
    """Mean of the format scores of the trajectories that exist, planner and workers alike.

    With `worker_share` s >= 0, and if there are workers: (1 - s) * planner + s * mean over workers.

    Equal scores in another order, or equal means over other numbers of trajectories (3/5, and 1 and
    1/5), give an equal reward to the last bit, or a group that teaches nothing would look
    informative: the sum is exact, and the mean is rounded to `_DIGITS`.
    """
    scores = [item.format_score for item in trajectories if item.role is Role.WORKER]
    (planner,) = (item.format_score for item in trajectories if item.role is Role.PLANNER)
    share = len(scores) / len(trajectories) if worker_share < 0 else worker_share
    workers = math.fsum(scores) / len(scores) if scores else planner
    return round((1.0 - share) * planner + share * workers, _DIGITS)


def reference_format(trajectories: Sequence[Trajectory], *, can_delegate: bool) -> float:
    """The format part of the original's reward, before its weight.

    Args:
        trajectories: planner and workers.
        can_delegate: the planner has workers in its allow-list, whether it called them or not.
    """
    (planner,) = (_blocks_score(item) for item in trajectories if item.role is Role.PLANNER)
    if not can_delegate:
        return planner
    workers = [_blocks_score(item) for item in trajectories if item.role is Role.WORKER]
    return 0.5 * (planner + (math.fsum(workers) / len(workers) if workers else 0.0))


def _blocks_score(trajectory: Trajectory) -> float:
    """Share of well-formed calls among the complete blocks; 1 without any.

    The original knows no bound on calls, so one that was refused for it alone is well formed.
    """
    outcomes = [call.outcome for call in trajectory.calls]
    return format_score(
        CallOutcome.OK if outcome == CallOutcome.TOO_MANY else outcome
        for outcome in outcomes
        if outcome not in _UNSEEN_BY_REFERENCE
    )


def combine(
    accuracy: float, format_score: float, config: RewardConfig, verdict: str = ""
) -> Reward:
    """Weigh the parts; with `gate_format`, format counts only if accuracy is exactly 1."""
    counts = not config.gate_format or accuracy == 1.0
    total = config.accuracy_weight * accuracy
    total += config.format_weight * format_score if counts else 0.0
    return Reward(accuracy=accuracy, format=format_score, total=total, verdict=verdict)
