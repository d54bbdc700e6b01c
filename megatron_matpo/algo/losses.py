"""Policy and supervised losses: pure tensor functions over one micro-batch.

Every loss is a sum over tokens of value x weight divided by a denominator that the caller computed
over the WHOLE update on all data-parallel ranks (`data.schedule.weigh`, `total_weight`).
Micro-batch losses (and gradients) therefore add up to the update's, however the tokens were packed.

Letters: t tokens of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLossOptions:
    """Clipping bounds; see `AlgoConfig`."""

    clip_low: float
    clip_high: float
    dual_clip: float


@dataclass(frozen=True)
class ImportanceWeights:
    """Trainer / engine probability ratios as they weigh the policy loss; without gradient."""

    ratio: Tensor
    """[t] float32, before the cap."""
    weights: Tensor
    """[t] float32, capped or masked."""
    held_back: Tensor
    """[t] bool, tokens whose ratio the cap or the mask changed."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    denominator: float,
    options: PolicyLossOptions,
    importance: ImportanceWeights | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate with dual clip, a weighted mean over the whole update.

    Source: PPO, arXiv:1707.06347, Eq. 7; two separate bounds ("clip higher") DAPO,
    arXiv:2503.14476, Sec. 3.1; dual clip, arXiv:1912.09729, Eq. 5.
    Differs: the mean is over the whole update, workers included, where the MATPO code averaged
    per-micro-batch means. `importance` multiplies the clipped surrogate of each token (truncated
    importance sampling; see `importance_weights`).

    Args:
        logprobs: [t] float32, current policy, with gradient.
        old_logprobs: [t] float32, behaviour policy of the ratio.
        advantages: [t] float32.
        weights: [t] float32, 0 on tokens that are not trained.
        denominator: sum of the weights of the whole update, all ranks.
        options: clipping bounds.
        importance: weights of the engine-trainer correction, if any.

    Returns:
        The loss (scalar, with gradient); the ratio [t] and where the clip holds it back [t]
        bool, both without gradient.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = torch.clamp(ratio, 1.0 - options.clip_low, 1.0 + options.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if options.dual_clip > 0:
        bounded = torch.maximum(surrogate, options.dual_clip * advantages)
        surrogate = torch.where(advantages < 0, bounded, surrogate)
    if importance is not None:
        surrogate = surrogate * importance.weights
    loss = -(surrogate * weights).sum() / denominator
    with torch.no_grad():
        outside = ((ratio < 1.0 - options.clip_low) & (advantages < 0)) | (
            (ratio > 1.0 + options.clip_high) & (advantages > 0)
        )
    return loss, ratio.detach(), outside


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    *,
    mode: str,
    cap: float,
) -> ImportanceWeights:
    """Per-token weights that correct for the engine having sampled with its own arithmetic.

    The weight is r = exp(old - rollout), both of the weights that sampled the token: trainer's
    arithmetic over the engine's. `truncate`: min(r, cap) (TIS; F. Yao et al., "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training", 2025; truncation after E. Ionides, 2008).
    `mask`: r inside [1 / cap, cap], else 0 (IcePop; Ling team, "Small Leak Can Sink a Great Ship",
    2025; differs: one bound instead of two). Masked tokens stay in the denominators.

    Args:
        old_logprobs: [t] float32, the trainer's.
        rollout_logprobs: [t] float32, the engine's.
        mode: `truncate` or `mask`.
        cap: at least 1.
    """
    with torch.no_grad():
        ratio = torch.exp(old_logprobs - rollout_logprobs)
        if mode == "truncate":
            return ImportanceWeights(ratio, ratio.clamp(max=cap), ratio > cap)
        outside = (ratio > cap) | (ratio < 1.0 / cap)
        return ImportanceWeights(ratio, ratio.masked_fill(outside, 0.0), outside)


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate [t] of KL(policy || reference) from sampled tokens, with gradient.

    With d = logprobs - reference_logprobs (J. Schulman, "Approximating KL divergence", 2020):

    * `k1` = d: unbiased value, but as a loss its expected gradient is 0 (E[grad log p] = 0), so it
      penalises nothing and only adds noise;
    * `k2` = d^2 / 2: biased value; its expected gradient is that of KL(policy || reference);
    * `k3` = exp(-d) - 1 + d: unbiased value, never negative; its expected gradient is that of the
      other direction, KL(reference || policy) (GRPO, arXiv:2402.03300, Eq. 4, uses it).

    The expectations are over tokens of the current policy; after the first of several updates they
    hold approximately. Source of the gradients: arXiv:2506.09477 (Y. Tang, R. Munos).

    Args:
        logprobs: [t] float32, current policy, with gradient.
        reference_logprobs: [t] float32, without gradient.
        estimator: `k1`, `k2` or `k3`.
    """
    difference = logprobs - reference_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    return torch.expm1(-difference) + difference


def supervised_loss(logprobs: Tensor, mask: Tensor, *, denominator: float) -> Tensor:
    """Negative log-likelihood of the masked tokens, token-mean over the whole update."""
    return -(logprobs * mask).sum() / denominator
