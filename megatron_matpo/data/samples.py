"""From episode trees to training samples. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile

from megatron_matpo.types import (
    PolicyVersion,
    Role,
    RolloutBatch,
    TrainSample,
    Trajectory,
    TurnKind,
)


def to_sample(
    trajectory: Trajectory, episode_id: str, advantage: float, version: PolicyVersion
) -> TrainSample:
    """One trajectory as next-token prediction: T tokens become T - 1 positions.

    `version` is the one that the step trains from.
    """
    tokens = trajectory.token_ids
    return TrainSample(
        trajectory_id=trajectory.id,
        episode_id=episode_id,
        role=trajectory.role,
        input_ids=tokens[:-1],
        labels=tokens[1:],
        loss_mask=trajectory.loss_mask[1:],
        rollout_logprobs=trajectory.logprobs[1:],
        advantage=advantage,
        is_current=_current_tokens(trajectory, version),
    )


def _current_tokens(trajectory: Trajectory, version: PolicyVersion) -> list[int] | None:
    """[T - 1] 1 where `version` sampled the token; None if it sampled all that were sampled."""
    spans = [span for turn in trajectory.turns for span in turn.versions]
    if all(span.version == version for span in spans):
        return None
    flags: list[int] = []
    for turn in trajectory.turns:
        if turn.kind is TurnKind.MODEL:
            for span in turn.versions:
                flags += [int(span.version == version)] * span.num_tokens
        else:
            flags += [0] * len(turn.token_ids)
    return flags[1:]


def to_samples(batch: RolloutBatch, advantages: Mapping[str, float]) -> list[TrainSample]:
    """All trainable trajectories of a step, planner before its workers, in the batch's order.

    Episodes without a reward (failed outside the model) and trajectories without a sampled token
    are left out. A trajectory appears exactly once.
    """
    return [
        to_sample(trajectory, episode.id, advantages[episode.id], batch.policy_version)
        for group in batch.groups
        for episode in group.episodes
        if episode.id in advantages
        for trajectory in episode.trajectories
        if trajectory.num_sampled_tokens > 0
    ]


def to_reference_samples(batch: RolloutBatch, advantages: Mapping[str, float]) -> list[TrainSample]:
    """As `to_samples`, with what the original MATPO code does to workers (`compat: reference`).

    A worker's token at response position t has the advantage only where the planner's token at its
    response position t was sampled, and 0 where the planner's row holds a tool reply or has ended;
    such tokens still count in the denominators (C1). Response positions count from the end of the
    initial prompt. All planners come before all workers, which decides who shares an update (C6).

    Source: MATPO `verl/protocol.py:1287-1288`, `core_algos.py:219`, `ray_trainer.py:1071-1101`.
    """
    planners: list[TrainSample] = []
    workers: list[TrainSample] = []
    scored = [item for group in batch.groups for item in group.episodes if item.id in advantages]
    for episode in scored:
        for trajectory in episode.trajectories:
            if trajectory.num_sampled_tokens == 0:
                continue
            sample = to_sample(trajectory, episode.id, advantages[episode.id], batch.policy_version)
            if trajectory.role is Role.PLANNER:
                planners.append(sample)
            else:
                mask = _mask_of_parent(trajectory, episode.planner)
                workers.append(replace(sample, advantage_mask=mask))
    return planners + workers


def _mask_of_parent(worker: Trajectory, planner: Trajectory) -> list[int]:
    """[T - 1] the planner's loss mask at the worker's response positions, aligned with labels."""
    responses = planner.loss_mask[_prompt_tokens(planner) :]
    length = worker.num_tokens - _prompt_tokens(worker)
    padded = responses[:length] + [0] * (length - len(responses))
    return [*([0] * _prompt_tokens(worker)), *padded][1:]


def _prompt_tokens(trajectory: Trajectory) -> int:
    """Length of the initial prompt."""
    prompt = takewhile(lambda turn: turn.kind is TurnKind.PROMPT, trajectory.turns)
    return sum(len(turn.token_ids) for turn in prompt)
