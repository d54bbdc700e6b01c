"""`RolloutManager`: a step number and a policy version in, the step's episodes out.

A synchronous step holds no state beyond itself: where it goes on in the data is asked. Groups that
outlive a step are those of `open_groups.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_matpo import wire
from megatron_matpo.agents.driver import Driver, EpisodeLimits, EpisodeTree
from megatron_matpo.agents.prompt_check import check_prompts
from megatron_matpo.agents.roster import make_roster
from megatron_matpo.agents.sampling import Sampler
from megatron_matpo.agents.tools import ToolBox
from megatron_matpo.config.evaluation import TRAIN_SPLIT
from megatron_matpo.config.root import Config
from megatron_matpo.data.chat import Chat
from megatron_matpo.data.dataset import Question
from megatron_matpo.errors import ConfigError
from megatron_matpo.obs.files import write_atomic
from megatron_matpo.obs.span_files import SpanFile, attempt_of, is_traced
from megatron_matpo.obs.spans import recording
from megatron_matpo.rewards.judge import Judge
from megatron_matpo.rewards.scorer import Scorer
from megatron_matpo.rollout.jobs import eval_jobs, train_jobs
from megatron_matpo.rollout.lasting import LastingRollout, MovingPolicy
from megatron_matpo.rollout.metrics import MeteredToolBox, refill_metrics, rollout_metrics
from megatron_matpo.rollout.open_groups import OpenGroups
from megatron_matpo.rollout.refill import Collected, collect_groups
from megatron_matpo.rollout.scheduler import RunEpisode, Scheduler
from megatron_matpo.rollout.step_trace import StepTrace
from megatron_matpo.types import Group, PolicyVersion, RolloutBatch, RowAsk

_log = logging.getLogger(__name__)


class RolloutManager:
    """Collects steps."""

    def __init__(
        self,
        config: Config,
        sampler_for: Callable[[PolicyVersion], Sampler],
        tools: ToolBox,
        chat: Chat,
        questions: Mapping[str, Sequence[Question]],
        judge: Judge | None = None,
        moving: MovingPolicy | None = None,
    ) -> None:
        """Check that the parts fit together.

        Args:
            config: a validated configuration.
            sampler_for: the policy at a version (`routing.Router.sampler`, or a fake).
            tools: started tool servers.
            chat: the policy's chat rendering.
            questions: rows by split: `train`, and the names of the evaluation sets.
            judge: an entered judge, if `reward.grader` is `judge`.
            moving: the policy as it changes, for the episodes that outlive a step
                (`routing.Router`); needed with `rollout.max_staleness`.

        Raises:
            ConfigError: an allow-list or the grader names something that does not exist, or the
                rows' system prompts, which the planner is to have, offer what it may not call.
        """
        self._config = config
        self._sampler_for, self._moving = sampler_for, moving
        self._tools = tools
        self._chat = chat
        self._questions = questions
        self._judge = judge
        self._attempt = attempt_of(Path(config.run_dir))
        self._roster = make_roster(config.agents, config.rollout, tools.specs())
        for split, rows in questions.items():
            self._report_prompts(split, rows)
        Scorer(config, judge)  # refuses what does not exist now, not in the first step
        self._limits = EpisodeLimits(
            context_tokens=config.rollout.context_length,
            timeout_s=config.rollout.episode_timeout_s,
            report_max_chars=config.tools.result_max_chars,
        )
        outlive = config.rollout.max_staleness > 0 or config.rollout.over_sample > 0
        self._lasting = self._make_lasting() if outlive and TRAIN_SPLIT in questions else None

    def _report_prompts(self, split: str, rows: Sequence[Question]) -> None:
        """Log once how the rows' system prompts differ from what the planner may call."""
        planner = self._roster.planner
        level = logging.WARNING if planner.takes_prompt_of_row else logging.INFO
        for line in check_prompts(rows, planner, split):
            _log.log(level, "%s", line)

    async def collect(
        self,
        step: int,
        version: PolicyVersion,
        split: str = TRAIN_SPLIT,
        asks: Sequence[RowAsk] | None = None,
        position: int = 0,
    ) -> RolloutBatch:
        """Run the episodes of `step` with policy `version`.

        `train`: the `data.prompts_per_step` questions that follow the first `position` ones,
        `data.samples_per_prompt` episodes each, and replacements (`rollout.dynamic_sampling`); also
        written to `RUN/rollouts/step_N.rollout` if `obs.record_rollouts`. Any other split: see
        `rollout.jobs.eval_jobs`; whoever asks for certain rows (`asks`) gets all that came, and
        judges by itself whether too many failed.

        Raises:
            RolloutError: too many episodes failed for reasons outside the model.
            ConfigError: no such split or row, or the split has no rows.
        """
        if split == TRAIN_SPLIT and self._lasting is not None:
            batch = await self._lasting.collect(step, version, position)
            await self._keep(batch)
            return batch
        start = time.monotonic()
        tools = MeteredToolBox(self._tools)
        driver = Driver(self._roster, self._chat, tools, self._limits)
        sampler = self._sampler_for(version)

        async def run_episode(episode_id: str, question: Question) -> EpisodeTree:
            return await driver.run(sampler, episode_id, question.system, question.user)

        limits = self._config.rollout
        if asks is not None:
            limits = replace(limits, max_failed_frac=1.0)
        scorer = Scorer(self._config, self._judge)
        scheduler = Scheduler(scorer, limits)
        with self._tracing(step, split, is_part=asks is not None):
            if split == TRAIN_SPLIT:
                collected = await self._collect_train(scheduler, run_episode, step, position)
            else:
                jobs = eval_jobs(self._config, self._rows(split), step, split, asks)
                collected = Collected(await scheduler.run(jobs, run_episode))
        metrics = rollout_metrics(collected.groups, time.monotonic() - start)
        metrics |= tools.metrics() | scorer.metrics()
        if self._config.rollout.dynamic_sampling and split == TRAIN_SPLIT:
            metrics |= refill_metrics(collected)
        next_position = position + collected.num_questions
        batch = RolloutBatch(step, version, tuple(collected.groups), metrics, next_position)
        await self._keep(batch, split)
        return batch

    def in_flight(self, trained_step: int) -> RolloutBatch | None:
        """See `OpenGroups.in_flight`; None in a synchronous run, which has nothing in flight."""
        return self._lasting.groups.in_flight(trained_step) if self._lasting is not None else None

    def restore(self, saved: RolloutBatch) -> None:
        """Take over what a checkpoint had in flight, before the first `collect`.

        A synchronous run takes it over too, and its steps are then those of a bound of 0.

        Raises:
            DataError: the training set is not the one of the checkpoint any more.
        """
        if self._lasting is None:
            self._lasting = self._make_lasting()
        self._lasting.groups.restore(saved)
        _log.info(
            "%d groups were in flight, with %d episodes that had ended",
            len(saved.groups),
            sum(len(group.episodes) for group in saved.groups),
        )

    async def close(self) -> None:
        """Cancel the episodes that outlived the last step."""
        if self._lasting is not None:
            await self._lasting.close()

    def _make_lasting(self) -> LastingRollout:
        config = self._config
        moving = self._moving if config.rollout.max_staleness > 0 else None
        tools, scorer = MeteredToolBox(self._tools), Scorer(config, self._judge)
        driver = Driver(self._roster, self._chat, tools, self._limits)

        async def play(sampler: Sampler, episode_id: str, question: Question) -> EpisodeTree:
            return await driver.run(sampler, episode_id, question.system, question.user)

        def policy(version: PolicyVersion) -> Sampler:
            return self._sampler_for(version) if moving is None else moving.follower()

        trace = StepTrace(Path(config.run_dir), self._attempt, config.obs.trace_every)
        sink = trace if config.obs.trace_every else None
        groups = OpenGroups(config, self._rows(TRAIN_SPLIT), play, policy, scorer, sink)
        return LastingRollout(config, groups, tools, scorer, trace, moving)

    async def _keep(self, batch: RolloutBatch, split: str = TRAIN_SPLIT) -> None:
        """Record a training step, and log what any step was."""
        if split == TRAIN_SPLIT and self._config.obs.record_rollouts:
            await asyncio.to_thread(self._record, batch)
        _log.info(
            "step %d (%s): %d episodes in %.1f s, %d left out, %d tokens sampled",
            batch.step,
            split,
            batch.metrics["rollout/episodes"],
            batch.metrics["time/collect_s"],
            batch.metrics["rollout/failed"],
            batch.metrics["tokens/sampled"],
        )

    @contextmanager
    def _tracing(self, step: int, split: str, *, is_part: bool) -> Iterator[None]:
        """Record what the block does if the step is traced; parts of a set never are."""
        if is_part or not is_traced(self._config.obs.trace_every, step):
            yield
            return
        role = "manager" if split == TRAIN_SPLIT else f"manager-{split}"
        file = SpanFile(Path(self._config.run_dir), role, step, self._attempt)
        try:
            with recording(file):
                yield
        finally:
            file.end()

    async def _collect_train(
        self, scheduler: Scheduler, run_episode: RunEpisode, step: int, position: int
    ) -> Collected:
        config, rows = self._config, self._rows(TRAIN_SPLIT)

        async def run_round(first: int, count: int) -> list[Group]:
            jobs = train_jobs(config, rows, step, first, position + first, count)
            return await scheduler.run(jobs, run_episode)

        max_rounds = config.rollout.dynamic_sampling_max_rounds
        return await collect_groups(
            run_round,
            config.data.prompts_per_step,
            max_rounds if config.rollout.dynamic_sampling else 0,
        )

    def _rows(self, split: str) -> Sequence[Question]:
        if split not in self._questions:
            known = ", ".join(self._questions)
            raise ConfigError(f"split={split}: no such questions; the manager has {known}")
        return self._questions[split]

    def _record(self, batch: RolloutBatch) -> None:
        path = wire.recording_path(Path(self._config.run_dir) / "rollouts", batch.step)
        write_atomic(path, wire.encode(batch), durable=False)
