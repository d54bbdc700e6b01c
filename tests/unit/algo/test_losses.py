"""Losses against float64 formulas, and their independence of packing."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_matpo.algo.losses import (
    PolicyLossOptions,
    importance_weights,
    kl_penalty,
    policy_loss,
    supervised_loss,
)
from megatron_matpo.algo.token_metrics import (
    TokenCounts,
    TokenMeans,
    importance_metrics,
    mismatch_metrics,
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
    loss, ratio, outside = policy_loss(
        new, old, advantages, mask, denominator=float(mask.sum()), options=OPTIONS
    )
    assert float(loss) == pytest.approx(oracle(new, old, advantages, mask), rel=1e-5)
    expected = ((ratio < 0.8) & (advantages < 0)) | ((ratio > 1.28) & (advantages > 0))
    assert torch.equal(outside, expected) and bool(outside.any())


def test_first_update_is_the_policy_gradient():
    new, _, advantages, mask = tensors(1)
    new.requires_grad_(True)
    loss, ratio, outside = policy_loss(
        new, new.detach(), advantages, mask, denominator=float(mask.sum()), options=OPTIONS
    )
    loss.backward()
    torch.testing.assert_close(new.grad, -advantages * mask / mask.sum())
    assert bool((ratio == 1).all()) and not outside.any() and not ratio.requires_grad


@pytest.mark.parametrize("split", [1, 2, 4])
def test_micro_batches_add_up(split):
    new, old, advantages, mask = tensors(2)
    whole, *_ = policy_loss(new, old, advantages, mask, denominator=11.0, options=OPTIONS)
    parts = [
        policy_loss(new[s], old[s], advantages[s], mask[s], denominator=11.0, options=OPTIONS)[0]
        for s in (slice(0, split), slice(split, None))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_weights_are_capped_or_masked(mode):
    ratios = [0.1, 0.5, 0.9, 1.0, 1.9, 2.1, 1e6]
    old = torch.tensor([ratios]).log()
    old.requires_grad_(True)
    weights = importance_weights(old, torch.zeros(1, 7), mode=mode, cap=2.0)
    expected = {
        "truncate": [0.1, 0.5, 0.9, 1.0, 1.9, 2.0, 2.0],
        "mask": [0.0, 0.5, 0.9, 1.0, 1.9, 0.0, 0.0],
    }[mode]
    assert weights.weights[0].tolist() == pytest.approx(expected)
    assert weights.held_back[0].tolist() == [
        w != pytest.approx(r) for w, r in zip(expected, ratios, strict=True)
    ]
    assert not weights.weights.requires_grad


def test_importance_multiplies_the_clipped_surrogate_and_has_no_gradient():
    new, old, advantages, mask = tensors(6)
    engine = old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
    weights = importance_weights(old, engine, mode="truncate", cap=1.1)
    new.requires_grad_(True)
    plain, *_ = policy_loss(new, old, advantages, mask, denominator=1.0, options=OPTIONS)
    (before,) = torch.autograd.grad(plain, new)
    loss, *_ = policy_loss(
        new, old, advantages, mask, denominator=1.0, options=OPTIONS, importance=weights
    )
    (after,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(after, before * (old - engine).exp().clamp(max=1.1))


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        ("k1", lambda d: d, lambda d: 1.0),
        ("k2", lambda d: d * d / 2, lambda d: d),
        ("k3", lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
    ],
)
def test_kl_estimators_are_the_formulas(estimator, value, slope):
    new = torch.tensor([[-1.0, -0.5, -3.0]], requires_grad=True)
    reference = torch.tensor([[-1.0, -2.0, -1.0]])
    kl = kl_penalty(new, reference, estimator)
    kl.sum().backward()
    differences = (new.detach() - reference)[0].tolist()
    assert kl[0].tolist() == pytest.approx([value(d) for d in differences])
    assert new.grad[0].tolist() == pytest.approx([slope(d) for d in differences])


def test_whose_gradient_a_kl_estimator_has():
    """Expectation over the policy itself, exactly, by summing over a small vocabulary."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)

    def grad(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    own = policy.detach().exp()
    expected = {
        "k1": torch.zeros(6, dtype=torch.float64),
        "k2": grad((policy.exp() * (policy - reference)).sum()),
        "k3": grad((reference.exp() * (reference - policy)).sum()),
    }
    for estimator, direction in expected.items():
        actual = grad((own * kl_penalty(policy, reference, estimator)).sum())
        torch.testing.assert_close(actual, direction, rtol=1e-9, atol=1e-12)


def means_of(mask, workers):
    is_worker = torch.tensor([[float(w)] for w in workers]).expand(mask.shape)
    worker_tokens = int((mask * is_worker).sum())
    counts = TokenCounts(int(mask.sum()) - worker_tokens, worker_tokens)
    return TokenMeans(mask, is_worker, counts)


def test_mismatch_is_zero_for_equal_and_counts_only_the_mask():
    new, old, _, mask = tensors(3)
    means = means_of(mask, [0, 1, 1, 0, 0])
    same = mismatch_metrics(new, new, means)
    assert all(float(value) == 0 for value in same.values())
    metrics = mismatch_metrics(new, old, means)
    kept = mask.bool()
    by_role = {"": kept, "/planner": kept.clone(), "/worker": kept.clone()}
    by_role["/planner"][1:3] = False
    by_role["/worker"][[0, 3, 4]] = False
    for suffix, chosen in by_role.items():
        difference = (new - old)[chosen].double()
        k3 = (difference.exp() - 1 - difference).mean()
        actual = float(metrics[f"mismatch/abs_logprob{suffix}"])
        assert actual == pytest.approx(float(difference.abs().mean()))
        assert float(metrics[f"mismatch/k3{suffix}"]) == pytest.approx(float(k3), rel=1e-5)
    assert float(metrics["mismatch/max"]) == pytest.approx(float((new - old)[kept].abs().max()))


def test_the_mismatch_of_the_trained_weights_leaves_older_tokens_out():
    new, old, _, mask = tensors(3)
    means = means_of(mask, [0, 1, 1, 0, 0])
    assert "mismatch/current" not in mismatch_metrics(new, old, means)
    current = torch.zeros_like(mask)
    current[:, 1] = 1.0
    chosen = (mask * current).bool()
    mixed = replace(means, counts=replace(means.counts, current=int(chosen.sum())))
    metrics = mismatch_metrics(new, old, mixed, current)
    expected = float((new - old)[chosen].abs().mean())
    assert float(metrics["mismatch/current"]) == pytest.approx(expected)
    # A micro-batch without older tokens, of a step that has some: its share counts whole.
    whole = mismatch_metrics(new, old, mixed)["mismatch/current"]
    assert float(whole) == pytest.approx(
        float((new - old)[mask.bool()].abs().sum()) / int(chosen.sum())
    )


def test_a_role_without_tokens_has_no_metrics():
    new, old, _, mask = tensors(3)
    metrics = mismatch_metrics(new, old, means_of(mask, [0] * 5))
    assert "mismatch/k3/planner" in metrics and "mismatch/k3/worker" not in metrics


def test_importance_metrics_are_by_role():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    ratio = torch.tensor([[1.0, 4.0, 9.0], [0.5, 0.5, 3.0]])
    weights = importance_weights(ratio.log(), torch.zeros(2, 3), mode="truncate", cap=2.0)
    metrics = importance_metrics(weights, means_of(mask, [0, 1]))
    assert {name: pytest.approx(float(value)) for name, value in metrics.items()} == {
        "policy/tis_weight/planner": 1.5,
        "policy/tis_weight/worker": 1.0,
        "policy/tis_weight_squared/planner": 2.5,
        "policy/tis_weight_squared/worker": 1.5,
        "policy/tis_held_back/planner": 0.5,
        "policy/tis_held_back/worker": 1 / 3,
        "policy/tis_ratio/planner/max": 4.0,
        "policy/tis_ratio/worker/max": 3.0,
    }


def test_supervised_loss_is_the_mean_negative_log_likelihood():
    new, _, _, mask = tensors(4)
    loss = supervised_loss(new, mask, denominator=float(mask.sum()))
    assert float(loss) == pytest.approx(-float(new[mask.bool()].mean()), rel=1e-6)
