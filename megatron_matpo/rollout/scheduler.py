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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_matpo.agents.driver import EpisodeTree
from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.data.dataset import Question
from megatron_matpo.errors import JudgeError, JudgeRefusedError, RolloutError
from megatron_matpo.obs.spans import note, place, span
from megatron_matpo.rewards.scorer import Score, Scorer
from megatron_matpo.rollout.failures import FailureBound
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


@dataclass(frozen=True, slots=True)
class GroupJob:
    """One question and how often it is asked."""

    uid: str
    row_index: int
    question: Question
    num_samples: int

    def group(self, episodes: Sequence[Episode]) -> Group:
        """The group with these episodes."""
        return Group(
            uid=self.uid,
            data_source=self.question.data_source,
            question=self.question.question,
            ground_truth=self.question.ground_truth,
            row_index=self.row_index,
            episodes=tuple(episodes),
            question_key=self.question.key,
            level=self.question.level,
            question_type=self.question.question_type,
        )


class Scheduler:
    """Runs the jobs of one step, or groups that outlive steps."""

    def __init__(self, scorer: Scorer, config: RolloutConfig) -> None:
        """`config` bounds concurrency, retries and failures."""
        self._scorer = scorer
        self._config = config
        self._gate = asyncio.Semaphore(config.max_concurrent_episodes)
        self.began_s = time.monotonic()
        """`Episode.start_s` counts from here."""
        self._failures = FailureBound(config)

    async def run(self, jobs: Sequence[GroupJob], run_episode: RunEpisode) -> list[Group]:
        """All groups, in the order of `jobs`. Cancelling it cancels every episode.

        Further calls are further rounds of the same step: failures add up.

        Raises:
            RolloutError: more than `rollout.max_failed_frac` of the step's episodes failed; raised
                as soon as that is certain, with the counted reasons. Or the judge refuses every
                request.
        """
        self._failures.expect(sum(job.num_samples for job in jobs))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._group(job, run_episode, {}, _ignore)) for job in jobs
                ]
        except* RolloutError as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def run_group(
        self,
        job: GroupJob,
        run_episode: RunEpisode,
        known: Mapping[int, Episode],
        on_episode: Callable[[Episode], None],
    ) -> Group:
        """One group, which no step waits for yet; cancelling it cancels its episodes.

        Args:
            job: the question.
            run_episode: runs one attempt, as soon as there is a place for it.
            known: episodes that it has already, by sample index; the others are run.
            on_episode: called with every other one as it ends.

        Raises:
            RolloutError: as `run`.
        """
        self._failures.expect(job.num_samples)
        return await self._group(job, run_episode, known, on_episode)

    async def _group(
        self,
        job: GroupJob,
        run_episode: RunEpisode,
        known: Mapping[int, Episode],
        on_episode: Callable[[Episode], None],
    ) -> Group:
        async def one(index: int) -> Episode:
            if index in known:
                return known[index]
            episode = await self._episode(job, index, run_episode)
            on_episode(episode)
            return episode

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index)) for index in range(job.num_samples)]
        except* RolloutError as errors:
            raise errors.exceptions[0] from None
        return job.group([task.result() for task in tasks])

    async def _run_to_tree(
        self, run_episode: RunEpisode, episode_id: str, question: Question
    ) -> EpisodeTree:
        """Run an episode; what it raises becomes its status, so that it never ends the step."""
        try:
            return await run_episode(episode_id, question)
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

    async def _episode(self, job: GroupJob, sample_index: int, run_episode: RunEpisode) -> Episode:
        episode_id = f"{job.uid}.{sample_index}"
        async with place(self._gate, "wait for a slot", (episode_id, "queue")):
            start_s = time.monotonic() - self.began_s
            with span("episode", (episode_id, "")) as running:
                tree, num_retries = await self._run_with_retries(
                    run_episode, episode_id, job.question
                )
        score, failure = Score(), f"{tree.planner.status}: {tree.planner.error}"
        with span("score", (episode_id, "score")) as scoring:
            if tree.planner.status not in INFRASTRUCTURE_FAILURES:
                score, failure = await self._score(episode_id, job.question, tree)
        if failure:
            self._failures.count(failure)
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
        self, run_episode: RunEpisode, episode_id: str, question: Question
    ) -> tuple[EpisodeTree, int]:
        """What the last attempt left behind, and how many came before it."""
        num_retries = 0
        while True:
            tree = await self._run_to_tree(run_episode, episode_id, question)
            status = tree.planner.status
            note(status=str(status), retries=num_retries)
            if status not in INFRASTRUCTURE_FAILURES:
                return tree, num_retries
            if num_retries >= self._config.max_episode_retries:
                return tree, num_retries
            _log.info("episode %s begins anew: %s: %s", episode_id, status, tree.planner.error)
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


def _ignore(episode: Episode) -> None:
    """Nobody follows the episodes of a step that is waited for as a whole."""
