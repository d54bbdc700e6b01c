"""One update's loss and gradients from transformers, unsharded, in float64, sequence by sequence.

The formula is written from docs/algorithm.md on the trees of episodes themselves: nothing of the
trainer's samples, advantages, masks, weights or losses is used.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_matpo.config import Config
from megatron_matpo.types import Episode, Group, RolloutBatch, Trajectory, TurnKind


@dataclass(frozen=True)
class Oracle:
    """What the first update must give."""

    loss: float
    gradients: dict[str, Tensor]
    """By Hugging Face name, float64."""


def oracle(folder: Path, config: Config, batch: RolloutBatch) -> Oracle:
    """Of the first of `algo.updates_per_step` updates, with the weights of `folder`."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    episodes = [
        (episode, advantage)
        for group in batch.groups
        for episode, advantage in _advantages(group, config)
    ]
    episodes = episodes[: len(episodes) // config.algo.updates_per_step]
    units: dict[str, list[Tensor]] = {}
    for episode, advantage in episodes:
        for trajectory in (episode.planner, *episode.workers):
            terms = _token_losses(model, trajectory, advantage, config)
            unit = {"token": "", "trajectory": trajectory.id, "episode": episode.id}
            units.setdefault(unit[config.algo.aggregation], []).append(terms)
    means = [torch.cat(terms).mean() for terms in units.values()]
    loss = torch.stack(means).mean()
    loss.backward()
    return Oracle(float(loss), {name: p.grad for name, p in model.named_parameters()})


def _advantages(group: Group, config: Config) -> Iterator[tuple[Episode, float]]:
    """Scored episodes with (R - mean) / (std + 1e-6), or without the division; 0 if all equal."""
    scored = [(e, e.reward.total) for e in group.episodes if e.reward is not None]
    rewards = [reward for _, reward in scored]
    for episode, reward in scored:
        if len(set(rewards)) == 1:
            yield episode, 0.0
            continue
        spread = statistics.stdev(rewards) + 1e-6 if config.algo.normalize_std else 1.0
        yield episode, (reward - statistics.mean(rewards)) / spread


def _token_losses(model: Any, trajectory: Trajectory, advantage: float, config: Config) -> Tensor:
    """[sampled tokens] -(importance x clipped surrogate), ratios as `algo` says."""
    algo = config.algo
    tokens = [token for turn in trajectory.turns for token in turn.token_ids]
    engine: list[tuple[int, float]] = []
    place = 0
    for turn in trajectory.turns:
        if turn.kind is TurnKind.MODEL:
            engine += [(place + i, value) for i, value in enumerate(turn.logprobs)]
        place += len(turn.token_ids)
    places = torch.tensor([p for p, _ in engine])
    reported = torch.tensor([value for _, value in engine], dtype=torch.float64)
    logits = model(input_ids=torch.tensor([tokens])).logits[0] / config.rollout.temperature
    table = logits.log_softmax(-1)
    logprobs = table[places - 1, torch.tensor(tokens)[places]]
    old = reported if algo.old_logprobs == "engine" else logprobs.detach()
    ratio = (logprobs - old).exp()
    bounded = ratio.clamp(1 - algo.clip_low, 1 + algo.clip_high)
    surrogate = torch.minimum(ratio * advantage, bounded * advantage)
    if algo.dual_clip and advantage < 0:
        surrogate = surrogate.clamp(min=algo.dual_clip * advantage)
    importance = torch.ones_like(ratio)
    if algo.tis == "truncate":
        importance = (old - reported).exp().clamp(max=algo.tis_cap)
    return -importance * surrogate
