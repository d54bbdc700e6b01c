"""`RolloutManager`: a step number and a policy version in, the step's episodes out."""

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
from megatron_matpo.rollout.metrics import MeteredToolBox, refill_metrics, rollout_metrics
from megatron_matpo.rollout.refill import Collected, collect_groups
from megatron_matpo.rollout.scheduler import Scheduler
from megatron_matpo.types import Group, PolicyVersion, RolloutBatch, RowAsk

_log = logging.getLogger(__name__)


class RolloutManager:
    """Collects steps. Holds no state between them: where a step goes on in the data is asked."""

    def __init__(
        self,
        config: Config,
        sampler_for: Callable[[PolicyVersion], Sampler],
        tools: ToolBox,
        chat: Chat,
        questions: Mapping[str, Sequence[Question]],
        judge: Judge | None = None,
    ) -> None:
        """Check that the parts fit together.

        Args:
            config: a validated configuration.
            sampler_for: the policy at a version (`routing.Router.sampler`, or a fake).
            tools: started tool servers.
            chat: the policy's chat rendering.
            questions: rows by split: `train`, and the names of the evaluation sets.
            judge: an entered judge, if `reward.grader` is `judge`.

        Raises:
            ConfigError: an allow-list or the grader names something that does not exist, or the
                rows' system prompts, which the planner is to have, offer what it may not call.
        """
        self._config = config
        self._sampler_for = sampler_for
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
        scheduler = Scheduler(run_episode, scorer, limits)
        with self._tracing(step, split, is_part=asks is not None):
            if split == TRAIN_SPLIT:
                collected = await self._collect_train(scheduler, step, position)
            else:
                jobs = eval_jobs(self._config, self._rows(split), step, split, asks)
                collected = Collected(await scheduler.run(jobs))
        metrics = rollout_metrics(collected.groups, time.monotonic() - start)
        metrics |= tools.metrics() | scorer.metrics()
        if self._config.rollout.dynamic_sampling and split == TRAIN_SPLIT:
            metrics |= refill_metrics(collected)
        next_position = position + collected.num_questions
        batch = RolloutBatch(step, version, tuple(collected.groups), metrics, next_position)
        if split == TRAIN_SPLIT and self._config.obs.record_rollouts:
            await asyncio.to_thread(self._record, batch)
        _log.info(
            "step %d (%s): %d episodes in %.1f s, %d left out, %d tokens sampled",
            step,
            split,
            metrics["rollout/episodes"],
            metrics["time/collect_s"],
            metrics["rollout/failed"],
            metrics["tokens/sampled"],
        )
        return batch

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

    async def _collect_train(self, scheduler: Scheduler, step: int, position: int) -> Collected:
        config, rows = self._config, self._rows(TRAIN_SPLIT)

        async def run_round(first: int, count: int) -> list[Group]:
            return await scheduler.run(train_jobs(config, rows, step, position, first, count))

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
