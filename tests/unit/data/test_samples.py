"""Proves which tokens of a training sample count as sampled by the weights that are trained."""

from dataclasses import replace

import torch

from megatron_matpo.algo.token_metrics import TokenCounts
from megatron_matpo.data.samples import to_sample, to_samples
from megatron_matpo.trainer.tensors import to_micro_batch
from megatron_matpo.types import Role, Status, Trajectory, Turn, TurnKind, VersionSpan
from tests.helpers.episodes import make_batch


def trajectory(*versions: tuple[VersionSpan, ...]) -> Trajectory:
    """A prompt of 2 tokens, and turns with these spans, with a reply of 3 tokens between them."""
    turns = [Turn(TurnKind.PROMPT, (1, 2), "prompt")]
    for spans in versions:
        if len(turns) > 1:
            turns.append(Turn(TurnKind.ENVIRONMENT, (3, 3, 3), "reply"))
        count = sum(span.num_tokens for span in spans)
        turns.append(Turn(TurnKind.MODEL, (7,) * count, "says", (-1.0,) * count, spans, "stop"))
    return Trajectory(
        "t", Role.PLANNER, "planner", "", 0, tuple(turns), Status.ANSWERED, format_score=1.0
    )


def test_tokens_of_older_weights_are_told_apart():
    item = trajectory((VersionSpan(4, 2), VersionSpan(5, 1)), (VersionSpan(5, 2),))
    sample = to_sample(item, "e", 1.0, version=5)
    assert sample.loss_mask == [0, 1, 1, 1, 0, 0, 0, 1, 1]
    assert sample.is_current == [0, 0, 0, 1, 0, 0, 0, 1, 1]
    assert TokenCounts.of([sample]) == TokenCounts(planner=5, worker=0, current=3)
    fresh = to_sample(trajectory((VersionSpan(5, 4),)), "e", 1.0, version=5)
    assert fresh.is_current is None
    assert TokenCounts.of([sample, fresh]).current == 7
    assert TokenCounts.of([fresh]) == TokenCounts(planner=4, worker=0)
    packed = to_micro_batch([fresh, sample], torch.device("cpu")).is_current
    assert packed is not None
    assert packed.tolist() == [1.0] * 5 + [float(flag) for flag in sample.is_current]
    assert to_micro_batch([fresh], torch.device("cpu")).is_current is None


def test_a_synchronous_step_has_no_older_tokens():
    batch = make_batch(4)
    advantages = {e.id: 0.5 for group in batch.groups for e in group.episodes if e.reward}
    assert all(sample.is_current is None for sample in to_samples(batch, advantages))
    older = to_samples(replace(batch, policy_version=4), advantages)
    assert all(sample.is_current is not None for sample in older)
