"""Policy and supervised losses: pure tensor functions over one micro-batch.

Every loss is a sum over tokens divided by a denominator that the caller computed over the WHOLE
update on all data-parallel ranks. Micro-batch losses (and gradients) therefore add up to the
update's, however the tokens were packed.

Letters: b trajectories of the micro-batch, s padded tokens.
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


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    denominator: float,
    options: PolicyLossOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate with dual clip, token-mean over the whole update.

    Source: PPO, arXiv:1707.06347, Eq. 7; dual clip, arXiv:1912.09729, Eq. 5; token mean as MATPO's
    default `loss_agg_mode`.
    Differs: the mean is over all sampled tokens of the update, workers included, where the MATPO
    code averaged per-micro-batch means.

    Args:
        logprobs: [b, s] float32, current policy, with gradient.
        old_logprobs: [b, s] float32, behaviour policy of the ratio.
        advantages: [b, s] float32.
        mask: [b, s] float32, 1 on trained tokens.
        denominator: trained tokens of the whole update, all ranks.
        options: clipping bounds.

    Returns:
        The loss (scalar) and metrics whose sum over micro-batches and ranks is the token mean.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = torch.clamp(ratio, 1.0 - options.clip_low, 1.0 + options.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if options.dual_clip > 0:
        bounded = torch.maximum(surrogate, options.dual_clip * advantages)
        surrogate = torch.where(advantages < 0, bounded, surrogate)
    loss = -(surrogate * mask).sum() / denominator
    with torch.no_grad():
        outside = ((ratio < 1.0 - options.clip_low) & (advantages < 0)) | (
            (ratio > 1.0 + options.clip_high) & (advantages > 0)
        )
        metrics = {
            "loss/policy": loss.detach(),
            "policy/ratio": (ratio * mask).sum() / denominator,
            "policy/clip_frac": (outside * mask).sum() / denominator,
        }
    return loss, metrics


def mismatch_metrics(
    logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, denominator: float
) -> dict[str, Tensor]:
    """How far the trainer's log-probs are from the engine's, for the same weights.

    `mismatch/abs_logprob` is the token mean of |trainer - engine|; `mismatch/k3` the token mean of
    exp(d) - 1 - d with d = trainer - engine, an estimate of KL(engine || trainer) (k3 estimator,
    J. Schulman, "Approximating KL divergence", 2020); `mismatch/max` the largest difference, to be
    reduced by maximum.
    """
    with torch.no_grad():
        difference = (logprobs - rollout_logprobs) * mask
        k3 = (torch.expm1(difference) - difference) * mask
        return {
            "mismatch/abs_logprob": difference.abs().sum() / denominator,
            "mismatch/k3": k3.sum() / denominator,
            "mismatch/max": difference.abs().max(),
        }


def token_mean(values: Tensor, mask: Tensor, *, denominator: float) -> Tensor:
    """Sum of `values` [b, s] over the mask, divided by the update's denominator (no gradient)."""
    with torch.no_grad():
        return (values * mask).sum() / denominator


def supervised_loss(logprobs: Tensor, mask: Tensor, *, denominator: float) -> Tensor:
    """Negative log-likelihood of the masked tokens, token-mean over the whole update."""
    return -(logprobs * mask).sum() / denominator
