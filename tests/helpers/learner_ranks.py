"""Functions that run on gloo ranks: the learner's step, and the reference model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.batch import MicroBatch
from megatron_matpo.megatron.optimizer_state import member_of
from megatron_matpo.trainer.credit import step_advantages, step_samples
from megatron_matpo.trainer.learner import PolicyLearner
from megatron_matpo.types import RolloutBatch
from tests.helpers.dist import RankInfo
from tests.helpers.megatron_ranks import layout, share
from tests.helpers.tiny import weighted_loss


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
            learner = PolicyLearner(config, actor, state)
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
    inner = member_of(actor._optimizer).optimizer
    tensors = [p for model in actor._models for p in model.parameters()]
    for group in inner.param_groups if inner is not None else ():
        for parameter in group["params"]:
            tensors += [parameter, *inner.state[parameter].values()]
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
