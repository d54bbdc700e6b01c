"""Runs a step's episodes: bounded concurrency, retries, and the bound on failures.

Invariants:

* one failed episode is a status and a count, never the step's end, and never a reward of 0;
* a retry starts afresh: nothing of the failed attempt is trained;
* a verdict that did not come is asked again by itself, the episode is not run again; waiting for it
  takes no other episode's place;
* the order of groups and of samples does not depend on which episode ends first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from megatron_matpo.agents.driver import EpisodeTree
from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.data.dataset import Question
from megatron_matpo.errors import JudgeError, JudgeRefusedError, RolloutError
from megatron_matpo.obs.spans import note, place, span
from megatron_matpo.rewards.scorer import Score, Scorer
from megatron_matpo.types import (
    INFRASTRUCTURE_FAILURES,
    Episode,
    Group,
    Role,
    Status,
    Trajectory,
)

_log = logging.getLogger(__name__)

RunEpisode = Callable[[str, Question], Awaitable[EpisodeTree]]
"""(episode id, question) -> what it left behind; failures are statuses."""

RETRY_PAUSE_S = 1.0
"""Before a fresh attempt: lets a restarting server come back; times 2 for each further one."""
_MAX_REASONS = 5
_MAX_REASON_CHARS = 300


@dataclass(frozen=True, slots=True)
class GroupJob:
    """One question of a step and how often it is asked."""

    uid: str
    row_index: int
    question: Question
    num_samples: int


class Scheduler:
    """Runs the jobs of one step."""

    def __init__(self, run_episode: RunEpisode, scorer: Scorer, config: RolloutConfig) -> None:
        """`config` bounds concurrency, retries and failures."""
        self._run_episode = run_episode
        self._scorer = scorer
        self._config = config
        self._gate = asyncio.Semaphore(config.max_concurrent_episodes)
        self._began = time.monotonic()
        self._reasons: Counter[str] = Counter()
        self._num_episodes = self._num_failed = 0

    async def run(self, jobs: Sequence[GroupJob]) -> list[Group]:
        """All groups, in the order of `jobs`. Cancelling it cancels every episode.

        Further calls are further rounds of the same step: failures add up.

        Raises:
            RolloutError: more than `rollout.max_failed_frac` of the step's episodes failed; raised
                as soon as that is certain, with the counted reasons. Or the judge refuses every
                request.
        """
        self._num_episodes += sum(job.num_samples for job in jobs)
        tasks: list[list[asyncio.Task[Episode]]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    tasks.append(
                        [
                            group.create_task(self._episode(job, index))
                            for index in range(job.num_samples)
                        ]
                    )
        except* RolloutError as errors:
            raise errors.exceptions[0] from None
        return [
            Group(
                uid=job.uid,
                data_source=job.question.data_source,
                question=job.question.question,
                ground_truth=job.question.ground_truth,
                row_index=job.row_index,
                episodes=tuple(task.result() for task in row),
                question_key=job.question.key,
                level=job.question.level,
                question_type=job.question.question_type,
            )
            for job, row in zip(jobs, tasks, strict=True)
        ]

    async def _run_to_tree(self, episode_id: str, question: Question) -> EpisodeTree:
        """Run an episode; what it raises becomes its status, so that it never ends the step."""
        try:
            return await self._run_episode(episode_id, question)
        except Exception as error:
            _log.exception("episode %s", episode_id)
            planner = Trajectory(
                id=f"{episode_id}.p",
                role=Role.PLANNER,
                agent="",
                parent_id="",
                spawn_turn=0,
                turns=(),
                status=Status.INTERNAL_ERROR,
                format_score=0.0,
                task=question.user,
                error=repr(error),
            )
            return EpisodeTree(planner, (), "")

    async def _episode(self, job: GroupJob, sample_index: int) -> Episode:
        episode_id = f"{job.uid}.{sample_index}"
        async with place(self._gate, "wait for a slot", (episode_id, "queue")):
            start_s = time.monotonic() - self._began
            with span("episode", (episode_id, "")) as running:
                tree, num_retries = await self._run_with_retries(episode_id, job.question)
        score, failure = Score(), f"{tree.planner.status}: {tree.planner.error}"
        with span("score", (episode_id, "score")) as scoring:
            if tree.planner.status not in INFRASTRUCTURE_FAILURES:
                score, failure = await self._score(episode_id, job.question, tree)
        if failure:
            self._count_failure(failure)
        return Episode(
            id=episode_id,
            uid=job.uid,
            sample_index=sample_index,
            planner=tree.planner,
            workers=tree.workers,
            reward=score.reward,
            answer=score.answer,
            failure=failure,
            num_retries=num_retries,
            start_s=start_s,
            duration_s=running.seconds,
            score_s=scoring.seconds,
        )

    async def _run_with_retries(
        self, episode_id: str, question: Question
    ) -> tuple[EpisodeTree, int]:
        """What the last attempt left behind, and how many came before it."""
        num_retries = 0
        while True:
            tree = await self._run_to_tree(episode_id, question)
            status = tree.planner.status
            note(status=str(status), retries=num_retries)
            if status not in INFRASTRUCTURE_FAILURES:
                return tree, num_retries
            if num_retries >= self._config.max_episode_retries:
                return tree, num_retries
            with span("pause before a retry", after=str(status)):
                await asyncio.sleep(RETRY_PAUSE_S * 2**num_retries)
            num_retries += 1

    async def _score(
        self, episode_id: str, question: Question, tree: EpisodeTree
    ) -> tuple[Score, str]:
        """The score of an episode that ran, or why there is none."""
        num_retries = 0
        while True:
            try:
                return await self._ask_scorer(question, tree), ""
            except JudgeRefusedError as error:
                raise RolloutError(str(error)) from error
            except JudgeError as error:
                failure = f"judge_failure: {error}"
            except Exception as error:
                _log.exception("scoring episode %s", episode_id)
                return Score(), f"internal_error: {error!r}"
            if num_retries >= self._config.max_episode_retries:
                return Score(), failure
            with span("pause before a retry"):
                await asyncio.sleep(RETRY_PAUSE_S * 2**num_retries)
            num_retries += 1

    async def _ask_scorer(self, question: Question, tree: EpisodeTree) -> Score:
        trajectories = (tree.planner, *tree.workers)
        return await self._scorer.score(
            question.question, tree.said, question.ground_truth, trajectories
        )

    def _count_failure(self, reason: str) -> None:
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
