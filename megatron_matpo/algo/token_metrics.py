"""Means over trained tokens, of all trajectories and by role: pure tensor functions.

Every mean is a sum divided by a number of tokens that the caller counted over the WHOLE step, all
updates and data-parallel ranks; so what micro-batches, updates and ranks return adds up to the
step's mean. Maxima (`/max`) are to be reduced by maximum.

Letters: t tokens of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul

import torch
from torch import Tensor

from megatron_matpo.algo.losses import ImportanceWeights
from megatron_matpo.types import Role, TrainSample


@dataclass(frozen=True)
class TokenCounts:
    """Trained tokens by role: the denominators of token means."""

    planner: int
    worker: int
    current: int | None = None
    """Of both roles, those that the trained weights sampled; None: all."""

    @property
    def total(self) -> int:
        """Of both roles; at least 1, so that dividing by it is harmless."""
        return max(1, self.planner + self.worker)

    @staticmethod
    def of(samples: Sequence[TrainSample]) -> TokenCounts:
        """Count the trained tokens of `samples`."""
        counts = dict.fromkeys(Role, 0)
        current, is_mixed = 0, False
        for sample in samples:
            num_trained = sum(sample.loss_mask)
            counts[sample.role] += num_trained
            if sample.is_current is None:
                current += num_trained
            else:
                current += sum(map(mul, sample.loss_mask, sample.is_current))
                is_mixed = True
        planner, worker = counts[Role.PLANNER], counts[Role.WORKER]
        return TokenCounts(planner, worker, current if is_mixed else None)


@dataclass(frozen=True)
class TokenMeans:
    """Shares of token means that one micro-batch contributes."""

    mask: Tensor
    """[t] float32, 1 on trained tokens."""
    is_worker: Tensor
    """[t] float32."""
    counts: TokenCounts

    def total(self, values: Tensor) -> Tensor:
        """Of all trained tokens; `values` [t], result a scalar without gradient."""
        with torch.no_grad():
            return (values * self.mask).sum() / self.counts.total

    def by_role(self, name: str, values: Tensor) -> dict[str, Tensor]:
        """`NAME/planner` and `NAME/worker`, without a role that trains no token in the step."""
        with torch.no_grad():
            return {
                f"{name}/{role}": (values * mask).sum() / count
                for role, mask, count in self._roles()
            }

    def max_by_role(self, name: str, values: Tensor) -> dict[str, Tensor]:
        """`NAME/ROLE/max` of the values on trained tokens, which are not negative."""
        with torch.no_grad():
            return {
                f"{name}/{role}/max": values.where(mask > 0, 0.0).amax()
                for role, mask, _ in self._roles()
            }

    def _roles(self) -> list[tuple[Role, Tensor, int]]:
        masks = (
            (Role.PLANNER, self.mask * (1 - self.is_worker), self.counts.planner),
            (Role.WORKER, self.mask * self.is_worker, self.counts.worker),
        )
        return [item for item in masks if item[2] > 0]


def mismatch_metrics(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    means: TokenMeans,
    is_current: Tensor | None = None,
) -> dict[str, Tensor]:
    """How far the trainer's log-probs are from the engine's, for the same weights.

    With tokens of older weights in the step (`means.counts.current`) they differ by what was learnt
    since, too; `mismatch/current` is the first of these metrics over the others alone
    (`is_current`, [t]; None: none of the micro-batch is older).

    `mismatch/abs_logprob` is the token mean of |trainer - engine|; `mismatch/k3` the token mean of
    exp(d) - 1 - d with d = trainer - engine, an estimate of KL(engine || trainer) (k3 estimator,
    J. Schulman, "Approximating KL divergence", 2020); both also by role. `mismatch/max` is the
    largest difference, by role `mismatch/abs_logprob/ROLE/max`.
    """
    with torch.no_grad():
        difference = (logprobs - rollout_logprobs) * means.mask
        current: dict[str, Tensor] = {}
        if means.counts.current is not None:
            same = difference.abs() if is_current is None else difference.abs() * is_current
            current["mismatch/current"] = same.sum() / max(1, means.counts.current)
        k3 = (torch.expm1(difference) - difference) * means.mask
        return {
            "mismatch/abs_logprob": means.total(difference.abs()),
            "mismatch/k3": means.total(k3),
            "mismatch/max": difference.abs().max(),
            **current,
            **means.by_role("mismatch/abs_logprob", difference.abs()),
            **means.by_role("mismatch/k3", k3),
            **means.max_by_role("mismatch/abs_logprob", difference.abs()),
        }


def policy_metrics(means: TokenMeans, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Token means `policy/NAME`, and `policy/NAME/ROLE` of planners' and workers' tokens."""
    metrics: dict[str, Tensor] = {}
    for name, value in values.items():
        metrics[f"policy/{name}"] = means.total(value)
        metrics |= means.by_role(f"policy/{name}", value)
    return metrics


def importance_metrics(importance: ImportanceWeights, means: TokenMeans) -> dict[str, Tensor]:
    """Of the engine-trainer correction, by role.

    `policy/tis_weight` and its square are means of the weights that were applied,
    `policy/tis_ratio` is the largest ratio before the cap, `policy/tis_held_back` the share of
    tokens capped or masked.
    """
    weights = importance.weights
    return {
        **means.by_role("policy/tis_weight", weights),
        **means.by_role("policy/tis_weight_squared", weights.square()),
        **means.by_role("policy/tis_held_back", importance.held_back.to(weights.dtype)),
        **means.max_by_role("policy/tis_ratio", importance.ratio),
    }


def with_sample_sizes(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a step, with effective sample sizes instead of the mean squared weights.

    `policy/tis_ess/ROLE` = mean(w)^2 / mean(w^2), in (0, 1]: the share of the role's tokens that
    unweighted sampling would have needed for the same variance (A. Kong, 1992). 0 if every token
    is masked.
    """
    prefix = "policy/tis_weight_squared/"
    result: dict[str, float] = {}
    for name, value in metrics.items():
        if not name.startswith(prefix):
            result[name] = value
            continue
        role = name.removeprefix(prefix)
        mean = metrics[f"policy/tis_weight/{role}"]
        result[f"policy/tis_ess/{role}"] = mean * mean / value if value > 0 else 0.0
    return result
