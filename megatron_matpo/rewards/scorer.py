"""Grades finished episodes: answer, verdict, reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_matpo.config.reward import JUDGE
from megatron_matpo.config.root import Config
from megatron_matpo.errors import ConfigError
from megatron_matpo.rewards.answer import extract_answer
from megatron_matpo.rewards.combine import combine, episode_format, reference_format
from megatron_matpo.rewards.graders import grader
from megatron_matpo.rewards.judge import Judge, JudgeCounts
from megatron_matpo.rewards.verdict import Verdict
from megatron_matpo.types import Reward, Role, Trajectory


@dataclass(frozen=True, slots=True)
class Score:
    """What an episode is worth."""

    answer: str = ""
    """The extracted answer; empty if none was found."""
    reward: Reward | None = None
    """None only if there was nobody to grade it."""


class Scorer:
    """Scores the episodes of one step; `counts` adds up what the judge did for them."""

    def __init__(self, config: Config, judge: Judge | None = None) -> None:
        """Look the grader up; `judge` is shared by all steps and used if the grader is `judge`.

        Raises:
            ConfigError: no such grader, or it is `judge` and there is none.
        """
        if config.reward.grader == JUDGE and judge is None:
            raise ConfigError("reward.grader=judge: no judge was opened")
        self.counts = JudgeCounts()
        self._judge = judge if config.reward.grader == JUDGE else None
        self._grade = None if self._judge else grader(config.reward.grader)
        self._config = config.reward
        self._is_reference = config.compat == "reference"
        workers = {name for name, agent in config.agents.items() if agent.role == Role.WORKER}
        self._can_delegate = not workers.isdisjoint(config.agents[config.rollout.planner].tools)

    async def score(
        self, question: str, said: str, ground_truth: str, trajectories: Sequence[Trajectory]
    ) -> Score:
        """Extract, grade and weigh. Without an answer accuracy is 0, and nobody is asked.

        Args:
            question: the bare question.
            said: the planner's own last turn, thoughts left out.
            ground_truth: of the dataset row.
            trajectories: planner and workers.

        Raises:
            JudgeError: no verdict came; there is no reward then, which is not a reward of 0.
        """
        answer = extract_answer(said) or ""
        accuracy, verdict = 0.0, ""
        if answer and self._judge is not None:
            verdict = await self._judge.verdict(question, ground_truth, answer, self.counts)
            accuracy = float(verdict is Verdict.CORRECT)
        elif answer and self._grade is not None:
            accuracy = self._grade(answer, ground_truth)
        if self._is_reference:
            format_part = reference_format(trajectories, can_delegate=self._can_delegate)
        else:
            format_part = episode_format(trajectories, self._config.worker_format_share)
        return Score(answer, combine(accuracy, format_part, self._config, verdict))

    def restart(self) -> None:
        """Begin to count anew; a request in progress counts its answer from now on."""
        self.counts.restart()

    def metrics(self) -> dict[str, float]:
        """`judge/*` of the step; empty with an offline grader."""
        return self.counts.metrics() if self._judge is not None else {}
