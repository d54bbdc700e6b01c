"""Metrics of groups that outlive a step: asynchronous rollout and over-sampling."""

from __future__ import annotations

_TRAINED = "over the step's sampled tokens, scored episodes"

ASYNC_METRICS: tuple[tuple[str, str, str, str], ...] = (
    (
        "mismatch/current",
        "nat",
        "mean over the trained tokens that the trained weights sampled, all ranks",
        "`mismatch/abs_logprob` without tokens of older weights; only in steps that have such.",
    ),
    (
        "rollout/staleness_mean",
        "versions",
        f"mean {_TRAINED}",
        "Age of a token: version that the step trains from minus the one that sampled it. This and "
        "the next ones only with `rollout.max_staleness`.",
    ),
    ("rollout/staleness_max", "versions", f"maximum {_TRAINED}", "The oldest."),
    ("rollout/staleness_share/*", "[0, 1]", f"share {_TRAINED}", "Tokens of this age."),
    (
        "rollout/continued_generations",
        "count",
        "sum over scored episodes",
        "Generations with tokens of several versions: a weight push met them.",
    ),
    (
        "rollout/in_flight_groups",
        "count",
        "when the step was handed over",
        "Groups that were begun and go on.",
    ),
    (
        "rollout/refreshed_groups",
        "count",
        "sum",
        "Groups that became too old; their questions are asked anew (`rollout.on_stale`).",
    ),
    ("rollout/dropped_groups", "count", "sum", "Groups that became too old and were left out."),
    (
        "rollout/ended_groups",
        "count",
        "sum",
        "Groups ended because enough others were complete (`rollout.over_sample` without "
        "`max_staleness`); the next step asks their questions first.",
    ),
)
"""(name, unit, reduction, meaning), as `metrics.MetricSpec`."""
