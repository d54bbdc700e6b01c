"""What the loop acts on: the parts of a run, and its side effects (log, save, evaluate)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from megatron_matpo.algo.advantages import num_uninformative_groups
from megatron_matpo.checkpoint_files import IN_FLIGHT
from megatron_matpo.config import Config
from megatron_matpo.data.schedule import num_trained_tokens
from megatron_matpo.errors import CheckpointError, ConfigError, RolloutError
from megatron_matpo.evaluation.inputs import FOLDER as EVALUATIONS
from megatron_matpo.evaluation.results import episode_results
from megatron_matpo.evaluation.summary import metrics, summarize
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.obs.metrics_log import MetricsWriter, read_metrics
from megatron_matpo.obs.recorder import write_rollouts_jsonl
from megatron_matpo.obs.report import build_report
from megatron_matpo.obs.spans import Span
from megatron_matpo.obs.stop_request import STOPPED_PHASE
from megatron_matpo.obs.wandb_log import WandbLog
from megatron_matpo.obs.why import PhaseHistory, StepFacts, explain
from megatron_matpo.trainer.clock import Clock
from megatron_matpo.trainer.learner import LearnResult, PolicyLearner
from megatron_matpo.trainer.placement import Placement
from megatron_matpo.trainer.rollouts import Rollouts
from megatron_matpo.trainer.stopping import StopRequested
from megatron_matpo.trainer.throughput import Throughput
from megatron_matpo.types import Group, PolicyVersion, RolloutBatch, TrainSample

_log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Folder of the run that holds them."""


class WeightSync(Protocol):
    """Keeps the engines on the trainer's weights. All ranks call."""

    def connect(self) -> None:
        """Form whatever the transport needs."""
        ...

    def push(self, version: PolicyVersion) -> PolicyVersion:
        """Send the weights; returns the version that the engines serve."""
        ...

    @property
    def metrics(self) -> dict[str, float]:
        """`sync/...` of the last push, on the logging rank; nothing if it sent nothing."""
        ...

    def refit(self, version: PolicyVersion) -> None:
        """Give the weights to engines that were started anew; the others serve on."""
        ...

    def close(self) -> None:
        """Release connections."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where a run stands; saved in every checkpoint."""

    step: int = 0
    """Finished steps."""
    policy_version: PolicyVersion = 0
    num_updates: int = 0
    """Optimizer updates; the learning rate is a function of it."""

    data_position: int = 0
    """Questions begun so far; not a function of the step with `rollout.dynamic_sampling`. With
    groups in flight, the manager's own count in the checkpoint goes before it."""

    def after(self, num_updates: int, data_position: int) -> Progress:
        """The state after one more step of `num_updates` updates."""
        return Progress(
            step=self.step + 1,
            policy_version=self.policy_version + 1,
            num_updates=self.num_updates + num_updates,
            data_position=data_position,
        )


class RunLog:
    """Everything that only the logging rank writes."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        """Open the metrics file and the W&B run."""
        self._config, self._run_dir = config, run_dir
        self._metrics = MetricsWriter(run_dir)
        self._wandb = WandbLog(config, run_dir)
        self._history = PhaseHistory()

    def resume_after(self, step: int) -> None:
        """Drop what a resumed run will write again; at the start that is step 0 too."""
        self._metrics.truncate_after(step if step > 0 else -1)
        for line in read_metrics(self._run_dir):
            self._history.add(line)

    def metrics(
        self, step: int, values: Mapping[str, float], *, partial: bool = False, why: str = ""
    ) -> None:
        """Append one line and send its numbers to W&B."""
        self._metrics.write(step, values, partial=partial, why=why)
        self._wandb.log(step, values)

    def why(
        self, values: Mapping[str, float], groups: Sequence[Group], spans: Sequence[Span]
    ) -> str:
        """Why the step with these metrics was slow; it is then one that later ones compare to."""
        places = self._config.rollout.max_concurrent_episodes
        text = explain(StepFacts(values, groups, spans, self._history.phases, places))
        self._history.add(values)
        return text

    def rollouts(self, batch: RolloutBatch, advantages: Mapping[str, float]) -> None:
        """Write the step's trajectories for people."""
        if self._config.obs.record_rollouts:
            path = self._run_dir / "rollouts" / f"step_{batch.step:06d}.jsonl"
            write_rollouts_jsonl(path, batch, advantages)

    def evaluation(self, name: str, batch: RolloutBatch) -> None:
        """Write the trajectories of an evaluation set for people."""
        if self._config.obs.record_rollouts:
            path = self._run_dir / EVALUATIONS / f"step_{batch.step:06d}_{name}.jsonl"
            write_rollouts_jsonl(path, batch, {})

    def report(self) -> None:
        """Rewrite `report.html`; a disk that refuses it does not end the training."""
        try:
            build_report(self._run_dir)
        except OSError as error:
            _log.warning("report.html was not written: %s", error)

    def close(self) -> None:
        """Finish the W&B run."""
        self._wandb.close()


@dataclass
class Run:
    """The parts of a run on this rank, wired in `build.py`. `log` is None off the logging rank."""

    config: Config
    run_dir: Path
    actor: MegatronActor
    learner: PolicyLearner
    rollouts: Rollouts
    sync: WeightSync
    placement: Placement
    clock: Clock
    log: RunLog | None
    throughput: Throughput
    saved_step: int = 0
    """Step of the newest checkpoint."""

    def resume(self) -> Progress:
        """Load the last checkpoint, or the initial model where there is none.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another model.
            ConfigError: a run whose engines keep their first weights cannot be resumed.
        """
        has_reference = self.config.algo.kl_coef > 0
        progress = load_progress(self.actor, self.run_dir, self.clock, has_reference=has_reference)
        if progress.step > 0 and self.config.weight_sync.transport == "none":
            raise ConfigError(
                "weight_sync.transport=none: this control experiment cannot be resumed, because "
                "the engines would get the trained weights; start it again under another run.name"
            )
        self.saved_step = progress.step
        if self.log is not None:
            self.log.resume_after(progress.step)
        return progress

    def connect(self) -> None:
        """Wait for the manager and the engines, inside `run.start_timeout_s`.

        Groups that the resumed checkpoint has in flight go to the manager.
        """
        self.clock.enter("connect")
        self.rollouts.connect()
        self.rollouts.restore(self.actor.restored)
        self.sync.connect()

    def record(
        self,
        step: int,
        batch: RolloutBatch,
        samples: Sequence[TrainSample],
        advantages: Mapping[str, float],
        result: LearnResult,
        evaluation: Mapping[str, float],
    ) -> None:
        """Write metrics and rollouts of a finished step (logging rank; elsewhere nothing)."""
        if self.log is None:
            return
        self.clock.enter("log")
        times = self.clock.metrics
        values = {
            **batch.metrics,
            **reward_metrics(batch),
            **result.metrics,
            **times,
            **self.sync.metrics,
            **self.throughput.metrics(samples, times["time/train_s"]),
            "policy_version": batch.policy_version + 1,
            "optim/updates": result.num_updates,
            "advantage/zero_groups": num_uninformative_groups(batch.groups)
            / max(1, len(batch.groups)),
            "tokens/trained": num_trained_tokens(samples),
            **evaluation,
        }
        why = self.log.why(values, batch.groups, self.clock.spans)
        self.log.metrics(step, values, why=why)
        self.log.rollouts(batch, advantages)
        if is_due(self.config.obs.report_every, step):
            self.log.report()

    def save(self, progress: Progress) -> None:
        """Begin a checkpoint if one is due; the one before stays until this one is complete.

        Raises:
            CheckpointError: this one or the one before could not be written, and
                `checkpoint.on_failure` is `stop`.
        """
        last = progress.step == self.config.run.steps
        if last or is_due(self.config.checkpoint.every, progress.step):
            self._save(progress, self.rollouts.in_flight(progress.step))
        else:
            self.actor.poll_save()

    def stop_early(self, progress: Progress) -> None:
        """Save what is not saved yet, and close everything; the same command goes on from here.

        If the manager does not answer any more, the weights are saved nevertheless, and the
        questions in flight are lost.
        """
        if progress.step > self.saved_step:
            try:
                in_flight = self.rollouts.in_flight(progress.step)
            except RolloutError as error:
                _log.warning("groups in flight are not in the last checkpoint: %s", error)
                in_flight = b""
            self._save(progress, in_flight)
        self.clock.enter("checkpoint")
        self.actor.finish_save()
        self._close()
        self.clock.enter(STOPPED_PHASE)

    def _save(self, progress: Progress, in_flight: bytes) -> None:
        save_progress(self.actor, self.run_dir, progress, self.clock, in_flight)
        self.saved_step = progress.step

    def evaluate_start(self, progress: Progress, version: PolicyVersion) -> None:
        """With `eval.before_train`, evaluate the initial policy; its metrics are of step 0.

        All ranks call.
        """
        if progress.step > 0 or not self.config.eval.before_train:
            return
        values = self._evaluate(0, version)
        if self.log is not None and values:
            self.log.metrics(0, values, partial=True)

    def evaluate(self, step: int, version: PolicyVersion) -> dict[str, float]:
        """`eval/SET/...` metrics of all `eval.sets`, if an evaluation is due. All ranks call.

        Returns:
            The metrics on the logging rank, nothing elsewhere.

        Raises:
            RolloutError: more than `rollout.max_failed_frac` of a set's episodes failed for reasons
                outside the model; fewer are counted (`eval/SET/failed`).
        """
        return self._evaluate(step, version) if is_due(self.config.eval.every, step) else {}

    def _evaluate(self, step: int, version: PolicyVersion) -> dict[str, float]:
        config = self.config
        if config.rollout.replay:
            return {}  # recordings hold training episodes only
        self.clock.enter("evaluate")
        values: dict[str, float] = {}
        for name in config.eval.named_sets:
            try:
                batch = self.rollouts.collect(step, version, name)
            except StopRequested:
                break  # the request stands: after this step's record the next one is not begun
            if self.log is not None:
                self.log.evaluation(name, batch)
                results = episode_results(batch)
                values |= metrics(summarize(name, results, config.eval, config.run.seed))
        return values

    def finish(self) -> None:
        """Wait for the last checkpoint; Hugging Face export and report; close everything."""
        self.clock.enter("checkpoint")
        self.actor.finish_save()
        if self.config.checkpoint.export_hf:
            self.clock.enter("export")
            self.actor.save_hf(self.run_dir / CHECKPOINTS / "hf")
        if self.config.lora.rank:
            self.actor.save_adapter(self.run_dir / CHECKPOINTS / "adapter")
        self._close()
        self.clock.enter("finished")

    def _close(self) -> None:
        self.sync.close()
        if self.log is not None:
            self.log.report()
            self.log.close()


def is_due(every: int, step: int) -> bool:
    """Whether something done each `every` steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0


def load_progress(
    actor: MegatronActor, run_dir: Path, clock: Clock, *, has_reference: bool = False
) -> Progress:
    """Restore the actor from the run's last checkpoint, or load the initial model. All ranks call.

    With `has_reference` it also keeps the initial model as reference, whatever is restored.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model.
    """
    clock.enter("load")
    if has_reference:
        actor.load_reference()
    saved = actor.restore(run_dir / CHECKPOINTS)
    if saved is None:
        actor.load_initial()
        return Progress()
    if "data_position" not in saved:
        raise CheckpointError(
            f"{run_dir / CHECKPOINTS}: written by an earlier version, without its position in the "
            "data; start the run again under another run.name"
        )
    return Progress(**saved)


def save_progress(
    actor: MegatronActor, run_dir: Path, progress: Progress, clock: Clock, in_flight: bytes = b""
) -> None:
    """Begin to write a checkpoint of `progress`; see `Checkpoints.save`. All ranks call.

    `in_flight` are rank 0's groups that are begun and not trained.
    """
    clock.enter("checkpoint")
    further = {IN_FLIGHT: in_flight} if in_flight else {}
    actor.save(run_dir / CHECKPOINTS, progress.step, asdict(progress), further)


def reward_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Means over the scored episodes; NaN when none was scored."""
    rewards = [
        episode.reward
        for group in batch.groups
        for episode in group.episodes
        if episode.reward is not None
    ]
    if not rewards:
        return dict.fromkeys(("reward/total", "reward/accuracy", "reward/format"), float("nan"))
    judged = [reward.verdict for reward in rewards if reward.verdict]
    verdicts = (
        {
            "reward/not_attempted": judged.count("not_attempted") / len(judged),
            "reward/judged": len(judged) / len(rewards),
        }
        if judged
        else {}
    )
    return verdicts | {
        "reward/total": sum(reward.total for reward in rewards) / len(rewards),
        "reward/accuracy": sum(reward.accuracy for reward in rewards) / len(rewards),
        "reward/format": sum(reward.format for reward in rewards) / len(rewards),
    }
