"""An episode's reward: accuracy of the answer and well-formedness of its tool calls.

Source: MATPO original, `verl/workers/reward_manager/subagent_tool.py`. Differs (the corrected
form): there, format is 0.5 * (planner + mean over workers), with 0 for a planner that has no
workers, so that not delegating costs half of the format reward; here it is the mean over the
trajectories that exist. An episode that failed for reasons outside the model gets no reward at all,
instead of 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_matpo.config.reward import RewardConfig
from megatron_matpo.rewards.answer import extract_answer
from megatron_matpo.rewards.graders import grader
from megatron_matpo.types import Reward, Trajectory


def episode_format(trajectories: Sequence[Trajectory]) -> float:
    """Mean of the format scores of the trajectories that exist, planner and workers alike."""
    return sum(item.format_score for item in trajectories) / len(trajectories)


def combine(accuracy: float, format_score: float, config: RewardConfig) -> Reward:
    """Weigh the parts; with `gate_format`, format counts only if accuracy is exactly 1."""
    counts = not config.gate_format or accuracy == 1.0
    total = config.accuracy_weight * accuracy
    total += config.format_weight * format_score if counts else 0.0
    return Reward(accuracy=accuracy, format=format_score, total=total)


class Scorer:
    """Grades finished episodes."""

    def __init__(self, config: RewardConfig) -> None:
        """Look the grader up.

        Raises:
            ConfigError: no such grader.
        """
        self._config = config
        self._grade = grader(config.grader)

    def score(
        self, said: str, ground_truth: str, trajectories: Sequence[Trajectory]
    ) -> tuple[str, Reward]:
        """(answer, reward); the answer is empty if none was found, and then accuracy is 0.

        Args:
            said: the planner's own last turn, thoughts left out.
            ground_truth: of the dataset row.
            trajectories: planner and workers.
        """
        answer = extract_answer(said)
        accuracy = self._grade(answer, ground_truth) if answer else 0.0
        return answer or "", combine(accuracy, episode_format(trajectories), self._config)
