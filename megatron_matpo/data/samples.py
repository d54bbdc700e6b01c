"""From episode trees to training samples. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_matpo.types import RolloutBatch, TrainSample, Trajectory


def to_sample(trajectory: Trajectory, episode_id: str, advantage: float) -> TrainSample:
    """One trajectory as next-token prediction: T tokens become T - 1 positions."""
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
    )


def to_samples(batch: RolloutBatch, advantages: Mapping[str, float]) -> list[TrainSample]:
    """All trainable trajectories of a step, planner before its workers, in the batch's order.

    Episodes without a reward (failed outside the model) and trajectories without a sampled token
    are left out. A trajectory appears exactly once.
    """
    return [
        to_sample(trajectory, episode.id, advantages[episode.id])
        for group in batch.groups
        for episode in group.episodes
        if episode.id in advantages
        for trajectory in episode.trajectories
        if trajectory.num_sampled_tokens > 0
    ]
