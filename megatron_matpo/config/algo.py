"""Section `algo`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AlgoConfig:
    """Advantage and loss."""

    normalize_std: bool = True
    """GRPO divides by the group's standard deviation; false is Dr. GRPO."""
    baseline: str = "group_mean"
    """`group_mean`, or `leave_one_out`: the mean of the group's other episodes (RLOO)."""
    aggregation: str = "token"
    """What the loss is a mean over: every `token`, every `trajectory` (mean of its tokens), or
    every `episode` (mean of the tokens of planner and workers together)."""
    advantage_scale: float = 1.0
    """Multiplies every advantage; 0 is the control experiment that must not learn."""
    updates_per_step: int = 1
    """Optimizer updates per rollout batch; planner episodes are split evenly among them. With
    `compat: reference` it sets their size, and workers make more of them."""
    clip_low: float = 0.2
    """The ratio is held at 1 - clip_low for negative advantages ..."""
    clip_high: float = 0.2
    """... and at 1 + clip_high for positive ones; more than `clip_low` is DAPO's clip-higher."""
    dual_clip: float = 3.0
    """Bound c of dual-clip PPO for negative advantages; 0 turns it off."""
    kl_coef: float = 0.0
    """Weight of the KL penalty in the loss, against the initial policy; 0: no reference model."""
    kl_estimator: str = "k3"
    """`k1 | k2 | k3` (J. Schulman, Approximating KL divergence, 2020). As a loss, k2 has the
    gradient of KL(policy || initial), k3 that of KL(initial || policy), k1 none in expectation."""
    tis: str = "off"
    """Importance weight trainer / engine on every token's policy loss: `off`, `truncate` (capped at
    `tis_cap`, TIS) or `mask` (0 outside [1 / tis_cap, tis_cap], IcePop)."""
    tis_cap: float = 2.0
    """At least 1."""
    old_logprobs: str = "trainer"
    """`trainer` recomputes old log-probs before the first update; `engine` takes the engine's."""
