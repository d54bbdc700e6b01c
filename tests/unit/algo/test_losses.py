"""Losses against float64 formulas, and their independence of packing."""

import math

import pytest
import torch

from megatron_matpo.algo.losses import (
    PolicyLossOptions,
    mismatch_metrics,
    policy_loss,
    supervised_loss,
)

OPTIONS = PolicyLossOptions(clip_low=0.2, clip_high=0.28, dual_clip=3.0)


def tensors(seed, rows=5, width=7):
    generator = torch.Generator().manual_seed(seed)
    new = -torch.rand(rows, width, generator=generator) * 3
    old = new + torch.randn(rows, width, generator=generator) * 0.7
    advantages = torch.randn(rows, 1, generator=generator).expand(rows, width)
    mask = (torch.rand(rows, width, generator=generator) < 0.6).float()
    return new, old, advantages, mask


def oracle(new, old, advantages, mask):
    """Token by token in Python floats: PPO clip, then the dual clip for negative advantages."""
    total = 0.0
    for i in range(new.shape[0]):
        for j in range(new.shape[1]):
            if mask[i, j] == 0:
                continue
            ratio = math.exp(float(new[i, j]) - float(old[i, j]))
            advantage = float(advantages[i, j])
            value = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
            if advantage < 0:
                value = max(value, 3.0 * advantage)
            total -= value
    return total / float(mask.sum())


@pytest.mark.parametrize("seed", range(8))
def test_policy_loss_matches_the_formula(seed):
    new, old, advantages, mask = tensors(seed)
    loss, metrics = policy_loss(
        new, old, advantages, mask, denominator=float(mask.sum()), options=OPTIONS
    )
    assert float(loss) == pytest.approx(oracle(new, old, advantages, mask), rel=1e-5)
    assert 0 <= float(metrics["policy/clip_frac"]) <= 1


def test_first_update_is_the_policy_gradient():
    new, _, advantages, mask = tensors(1)
    new.requires_grad_(True)
    loss, metrics = policy_loss(
        new, new.detach(), advantages, mask, denominator=float(mask.sum()), options=OPTIONS
    )
    loss.backward()
    torch.testing.assert_close(new.grad, -advantages * mask / mask.sum())
    assert float(metrics["policy/ratio"]) == pytest.approx(1.0)


@pytest.mark.parametrize("split", [1, 2, 4])
def test_micro_batches_add_up(split):
    new, old, advantages, mask = tensors(2)
    whole, _ = policy_loss(new, old, advantages, mask, denominator=11.0, options=OPTIONS)
    parts = [
        policy_loss(new[s], old[s], advantages[s], mask[s], denominator=11.0, options=OPTIONS)[0]
        for s in (slice(0, split), slice(split, None))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_mismatch_is_zero_for_equal_and_counts_only_the_mask():
    new, old, _, mask = tensors(3)
    count = float(mask.sum())
    same = mismatch_metrics(new, new, mask, denominator=count)
    assert all(float(value) == 0 for value in same.values())
    metrics = mismatch_metrics(new, old, mask, denominator=count)
    difference = (new - old)[mask.bool()].double()
    assert float(metrics["mismatch/abs_logprob"]) == pytest.approx(float(difference.abs().mean()))
    assert float(metrics["mismatch/max"]) == pytest.approx(float(difference.abs().max()))
    k3 = (difference.exp() - 1 - difference).mean()
    assert float(metrics["mismatch/k3"]) == pytest.approx(float(k3), rel=1e-5)


def test_supervised_loss_is_the_mean_negative_log_likelihood():
    new, _, _, mask = tensors(4)
    loss = supervised_loss(new, mask, denominator=float(mask.sum()))
    assert float(loss) == pytest.approx(-float(new[mask.bool()].mean()), rel=1e-6)
