"""Functions that run on gloo ranks: the learner's step, and the reference model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.errors import NonFiniteError
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.batch import MicroBatch
from megatron_matpo.megatron.optimizer_state import members_of
from megatron_matpo.trainer.credit import step_advantages, step_samples
from megatron_matpo.trainer.learner import PolicyLearner, policy_loss_fn
from megatron_matpo.types import Episode, RolloutBatch, Trajectory, Turn
from tests.helpers.dist import RankInfo
from tests.helpers.megatron_ranks import grads, layout, share
from tests.helpers.tiny import VOCAB_SIZE, weighted_loss


def learned(
    info: RankInfo, configs: Sequence[Config], batches: Sequence[RolloutBatch]
) -> list[list[dict[str, float]]]:
    """For each of `configs`, which share a layout: the metrics of a step on each of `batches`."""
    results: list[list[dict[str, float]]] = []
    with layout(info, configs[0]) as state:
        for config in configs:
            actor = _actor(config, state)
            actor.load_reference()
            actor.load_initial()
            learner = PolicyLearner(config, actor, state, Path(config.run_dir))
            steps: list[dict[str, float]] = []
            done = 0
            for index, batch in enumerate(batches):
                advantages = step_advantages(config, batch.groups)
                samples = step_samples(config, batch, advantages)
                result = learner.learn(learner.prepare(samples), done, index)
                done += result.num_updates
                steps.append({**result.metrics, "updates": result.num_updates})
            results.append(steps)
    return results


def first_updates(
    info: RankInfo, cases: Sequence[tuple[Config, RolloutBatch]]
) -> list[dict[str, Any]]:
    """Of each case, all of one layout: loss and gradients of the first update, then not made.

    `gradients` are by Hugging Face name on rank 0, nothing elsewhere.
    """
    stories: list[dict[str, Any]] = []
    with layout(info, cases[0][0]) as state:
        actor = _actor(cases[0][0], state)
        actor.load_initial()
        for config, batch in cases:
            learner = PolicyLearner(config, actor, state, Path(config.run_dir))
            samples = step_samples(config, batch, step_advantages(config, batch.groups))
            update = learner.prepare(samples)[0]
            loss_fn = policy_loss_fn(config.algo, update)
            results = actor._differentiate(update.batches, loss_fn)
            gradients = grads(actor, config, update.batches, state, loss_fn)
            story = {"loss": actor._reduce(results)["loss"], "gradients": gradients}
            stories.append({**story, "num_batches": len(update.batches)})
    return stories


def refused(
    info: RankInfo, config: Config, batches: Sequence[RolloutBatch], folder: Path
) -> list[dict[str, Any]]:
    """A step on each of `batches` until one stops the run: result or error, and weights."""
    steps: list[dict[str, Any]] = []
    with layout(info, config) as state:
        actor = _actor(config, state)
        actor.load_initial()
        learner = PolicyLearner(config, actor, state, folder)
        for index, batch in enumerate(batches):
            samples = step_samples(config, batch, step_advantages(config, batch.groups))
            step: dict[str, Any] = {}
            try:
                result = learner.learn(learner.prepare(samples), index, index)
                step |= {"metrics": result.metrics, "made": result.num_updates}
            except NonFiniteError as error:
                step["error"] = str(error)
            steps.append({**step, "weights": dict(actor.export())})
            if "error" in step:
                break
    return steps


def reference_story(
    info: RankInfo, config: Config, batches: Sequence[MicroBatch], folder: Path
) -> dict[str, Any]:
    """Score with the reference before and after an update and after a resume.

    The value of `kept` says what a swap there and back left bit for bit the same.
    """
    with layout(info, config) as state:
        actor = _actor(config, state)
        actor.load_reference()
        actor.load_initial()
        mine = share(batches, state)
        actor.update(mine, weighted_loss, 0)
        story: dict[str, Any] = {"dp_rank": state.dp_rank, "own": actor.score(mine)}
        before = _everything(actor)
        story["reference"] = actor.score_reference(mine)
        story["kept"] = _equal(before, _everything(actor))
        story["own again"] = actor.score(mine)
        story["next"] = actor.update(mine, weighted_loss, 1)
        story["reference later"] = actor.score_reference(mine)
        actor.save(folder, 2, {})
        actor.finish_save()

        resumed = _actor(config, state)
        resumed.load_reference()
        resumed.restore(folder)
        story["restored"] = _equal(_everything(actor), _everything(resumed))
        story["reference resumed"] = resumed.score_reference(mine)

        plain = _actor(config, state)
        plain.load_initial()
        plain.update(mine, weighted_loss, 0)
        story["next without"] = plain.update(mine, weighted_loss, 1)
    return story


def _actor(config: Config, state: Any) -> MegatronActor:
    """Without weights yet."""
    return MegatronActor(config, HfModelConfig.from_folder(config.model.path), state)


def _everything(actor: MegatronActor) -> list[torch.Tensor]:
    """Copies of this rank's parameters, main parameters and moments."""
    tensors = [p for model in actor._models for p in model.parameters()]
    for member in members_of(actor._optimizer):
        for group in member.optimizer.param_groups:
            for parameter in group["params"]:
                tensors += [parameter, *member.optimizer.state[parameter].values()]
    return [tensor.detach().clone() for tensor in tensors]


def _equal(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    """Bit for bit: a -0.0 is not a 0.0."""
    return len(before) == len(after) and all(
        torch.equal(a.view(torch.int32), b.view(torch.int32))
        for a, b in zip(before, after, strict=True)
    )


def with_algo(config: Config, **changes: Any) -> Config:
    """`config` with other settings in `algo`."""
    return replace(config, algo=replace(config.algo, **changes))


def for_tiny_model(batch: RolloutBatch) -> RolloutBatch:
    """The same trees with token ids that the tiny model has, and log-probs about as large."""

    def turn(item: Turn) -> Turn:
        return dataclasses.replace(
            item,
            token_ids=[token % VOCAB_SIZE for token in item.token_ids],
            logprobs=[value - 2.6 for value in item.logprobs],
        )

    def trajectory(item: Trajectory) -> Trajectory:
        return dataclasses.replace(item, turns=tuple(map(turn, item.turns)))

    def episode(item: Episode) -> Episode:
        workers = tuple(map(trajectory, item.workers))
        return dataclasses.replace(item, planner=trajectory(item.planner), workers=workers)

    groups = [
        dataclasses.replace(group, episodes=tuple(map(episode, group.episodes)))
        for group in batch.groups
    ]
    return dataclasses.replace(batch, groups=tuple(groups))
