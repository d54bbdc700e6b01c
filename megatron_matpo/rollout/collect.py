"""`RolloutManager`: a step number and a policy version in, the step's episodes out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_matpo import wire
from megatron_matpo.agents.driver import Driver, EpisodeLimits, EpisodeTree
from megatron_matpo.agents.roster import make_roster
from megatron_matpo.agents.sampling import Sampler
from megatron_matpo.agents.tools import ToolBox
from megatron_matpo.config.root import Config
from megatron_matpo.data.chat import Chat
from megatron_matpo.data.dataset import Question, prompts_for_step
from megatron_matpo.errors import ConfigError
from megatron_matpo.obs.files import write_atomic
from megatron_matpo.rewards.combine import Scorer
from megatron_matpo.rollout.metrics import MeteredToolBox, rollout_metrics
from megatron_matpo.rollout.scheduler import GroupJob, Scheduler
from megatron_matpo.types import PolicyVersion, RolloutBatch

_log = logging.getLogger(__name__)


class RolloutManager:
    """Collects steps. Holds no state between steps: a step is a function of its number."""

    def __init__(
        self,
        config: Config,
        sampler_for: Callable[[PolicyVersion], Sampler],
        tools: ToolBox,
        chat: Chat,
        questions: Mapping[str, Sequence[Question]],
    ) -> None:
        """Check that the parts fit together.

        Args:
            config: a validated configuration.
            sampler_for: the policy at a version (`routing.Router.sampler`, or a fake).
            tools: started tool servers.
            chat: the policy's chat rendering.
            questions: rows by split, `train` and `eval`.

        Raises:
            ConfigError: an allow-list or the grader names something that does not exist.
        """
        self._config = config
        self._sampler_for = sampler_for
        self._tools = tools
        self._chat = chat
        self._questions = questions
        self._scorer = Scorer(config.reward)
        self._roster = make_roster(config.agents, config.rollout.planner, tools.specs())
        self._limits = EpisodeLimits(
            context_tokens=config.rollout.context_length,
            timeout_s=config.rollout.episode_timeout_s,
            report_max_chars=config.tools.result_max_chars,
        )

    async def collect(
        self, step: int, version: PolicyVersion, split: str = "train"
    ) -> RolloutBatch:
        """Run the episodes of `step` with policy `version`.

        `train`: `data.prompts_per_step` rows (see `prompts_for_step`), `data.samples_per_prompt`
        episodes each; also written to `RUN/rollouts/step_N.rollout` if `obs.record_rollouts`.
        `eval`: the first `data.eval_prompts` rows of `data.eval`, one episode each.

        Raises:
            RolloutError: too many episodes failed for reasons outside the model.
            ConfigError: the split has no rows.
        """
        start = time.monotonic()
        tools = MeteredToolBox(self._tools)
        driver = Driver(self._roster, self._chat, tools, self._limits)
        sampler = self._sampler_for(version)

        async def run_episode(episode_id: str, question: Question) -> EpisodeTree:
            return await driver.run(sampler, episode_id, question.system, question.user)

        scheduler = Scheduler(run_episode, self._scorer, self._config.rollout)
        groups = await scheduler.run(self._jobs(step, split))
        metrics = rollout_metrics(groups, time.monotonic() - start) | tools.metrics()
        batch = RolloutBatch(step, version, tuple(groups), metrics)
        if split == "train" and self._config.obs.record_rollouts:
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

    def _jobs(self, step: int, split: str) -> list[GroupJob]:
        rows, data = self._questions.get(split, ()), self._config.data
        if not rows:
            raise ConfigError(f"data.{split}: there are no rows to collect")
        if split == "eval":
            indices = list(range(min(data.eval_prompts, len(rows))))
            num_samples = 1
        else:
            seed = self._config.run.seed
            indices = prompts_for_step(len(rows), data.prompts_per_step, seed, step)
            num_samples = data.samples_per_prompt
        # The position is part of the uid: where two epochs meet, a step can hold a row twice.
        return [
            GroupJob(f"{split}-{step}-{position}", index, rows[index], num_samples)
            for position, index in enumerate(indices)
        ]

    def _record(self, batch: RolloutBatch) -> None:
        path = wire.recording_path(Path(self._config.run_dir) / "rollouts", batch.step)
        write_atomic(path, wire.encode(batch), durable=False)
