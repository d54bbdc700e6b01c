"""Supervised training with the same actor (`matpo sft`): a cold start before MATPO.

Entry of a rank: `python -m megatron_matpo.trainer.sft --run-dir RUN`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import distributed as dist

from megatron_matpo.config import Config
from megatron_matpo.data.conversations import batch_indices, read_conversations
from megatron_matpo.data.schedule import num_trained_tokens
from megatron_matpo.data.tokenizer import Tokenizer
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.obs.stop_request import STOPPED_PHASE
from megatron_matpo.trainer.actor import build_actor, form_groups
from megatron_matpo.trainer.clock import Clock
from megatron_matpo.trainer.learner import SupervisedLearner
from megatron_matpo.trainer.process import run_rank
from megatron_matpo.trainer.run import (
    CHECKPOINTS,
    Progress,
    RunLog,
    is_due,
    load_progress,
    save_progress,
)
from megatron_matpo.trainer.stopping import is_stop_agreed
from megatron_matpo.trainer.throughput import Throughput


def train_supervised(config: Config, run_dir: Path, clock: Clock) -> None:
    """Train for `sft.steps` updates on `sft.data` and export a Hugging Face folder. All ranks call.

    Raises:
        DataError: a conversation is malformed.
        NonFiniteError: before the optimizer moved.
    """
    # Cross entropy is of the policy itself, whatever temperature a rollout would sample at.
    config = replace(config, rollout=replace(config.rollout, temperature=1.0))
    tokenizer = Tokenizer.load(config.model.path)
    samples = read_conversations(config.sft.data, tokenizer, config.rollout.context_length)
    state = form_groups(config, clock)
    actor = build_actor(config, clock, state, config.sft.steps)
    learner = SupervisedLearner(config, actor, state, run_dir)
    log = RunLog(config, run_dir) if state.is_logging_rank else None
    throughput = Throughput.of(config)
    progress = load_progress(actor, run_dir, clock)
    if log is not None:
        log.resume_after(progress.step)
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    saved_step = progress.step
    while progress.step < config.sft.steps and not is_stop_agreed(run_dir, group):
        step = progress.step + 1
        with clock.step(step), clock.phase("train"):
            rows = batch_indices(len(samples), config.sft.batch_size, config.run.seed, step)
            batch = [samples[row] for row in rows]
            result = learner.learn(batch, progress.num_updates)
        progress = Progress(step, step, step)
        if log is not None:
            values = {**result.metrics, **clock.metrics}
            values |= throughput.metrics(batch, values["time/train_s"])
            values["tokens/trained"] = num_trained_tokens(batch)
            log.metrics(step, values, partial=True, why=log.why(values, (), clock.spans))
        if step == config.sft.steps or is_due(config.checkpoint.every, step):
            save_progress(actor, run_dir, progress, clock)
            saved_step = step
        else:
            actor.poll_save()
    if progress.step > saved_step:
        save_progress(actor, run_dir, progress, clock)
    clock.enter("checkpoint")
    actor.finish_save()
    is_done = progress.step >= config.sft.steps
    if is_done:
        _export(config, run_dir, actor, clock)
    if log is not None:
        log.close()
    clock.enter("finished" if is_done else STOPPED_PHASE)


def _export(config: Config, run_dir: Path, actor: MegatronActor, clock: Clock) -> None:
    clock.enter("export")
    actor.save_hf(config.sft.export or run_dir / CHECKPOINTS / "hf")
    if config.lora.rank:
        actor.save_adapter(run_dir / CHECKPOINTS / "adapter")


if __name__ == "__main__":
    run_rank(train_supervised)
