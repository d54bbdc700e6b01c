"""What each token of a step is credited with: advantages and training samples, by configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from megatron_matpo.algo.advantages import GroupRule, episode_advantages, group_advantages
from megatron_matpo.algo.reference import reference_group_advantages
from megatron_matpo.config import Config
from megatron_matpo.data.samples import to_reference_samples, to_samples
from megatron_matpo.types import Group, RolloutBatch, TrainSample


def step_advantages(config: Config, groups: Sequence[Group]) -> dict[str, float]:
    """Advantage of every trainable episode of a step, by episode id."""
    algo = config.algo
    rule: GroupRule
    if config.compat == "reference":
        rule = partial(reference_group_advantages, normalize_std=algo.normalize_std)
    else:
        rule = partial(group_advantages, normalize_std=algo.normalize_std, baseline=algo.baseline)
    return episode_advantages(groups, rule, scale=algo.advantage_scale)


def step_samples(
    config: Config, batch: RolloutBatch, advantages: Mapping[str, float]
) -> list[TrainSample]:
    """All trainable trajectories of a step; the same list on every rank."""
    build = to_reference_samples if config.compat == "reference" else to_samples
    return build(batch, advantages)
