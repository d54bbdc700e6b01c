"""The registry of metric names; `metrics_log.py` writes their values.

A name that is not in `METRICS` cannot be written, so `docs/metrics.md`, which is generated from the
registry, never lacks one. Values arrive reduced over ranks; `reduction` says how that was done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_matpo.obs.async_metrics import ASYNC_METRICS


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """What one name, or every name that fits a pattern with `*`, means."""

    name: str
    unit: str
    reduction: str
    """How one number per step comes about, over tokens, trajectories, updates and ranks."""
    description: str
    required: bool = False
    """Every complete line has it."""


def _required(name: str, unit: str, reduction: str, description: str) -> MetricSpec:
    return MetricSpec(name, unit, reduction, description, required=True)


_TOKENS = "mean over trained tokens, all ranks"
_TOKENS_OF_ROLE = "mean over the trained tokens of a role, all ranks"
_EPISODES = "mean over scored episodes"
_BY_ROLE = "mean over the trajectories of a role, scored episodes"

METRICS: tuple[MetricSpec, ...] = (
    _required("step", "", "same on all ranks", "Training step, from 1; also the x axis in W&B."),
    _required(
        "policy_version", "", "same on all ranks", "Weight pushes so far, after this step's push."
    ),
    _required("reward/total", "", _EPISODES, "Reward that the advantage is computed from."),
    _required("reward/accuracy", "[0, 1]", _EPISODES, "Unweighted verdict of the grader."),
    _required(
        "reward/format",
        "[0, 1]",
        _EPISODES,
        "Unweighted share of well-formed tool calls, workers' share included.",
    ),
    MetricSpec(
        "reward/not_attempted",
        "[0, 1]",
        "mean over judged episodes",
        "The judge's third grade, among the episodes that it graded.",
    ),
    MetricSpec(
        "reward/judged", "[0, 1]", _EPISODES, "Has a verdict; without an answer nobody is asked."
    ),
    MetricSpec("reward/*", "", _EPISODES, "Other statistics of the reward (std, min, max, ...)."),
    _required(
        "advantage/zero_groups",
        "[0, 1]",
        "share of the step's groups",
        "Groups in which every episode got the same reward: they teach nothing.",
    ),
    MetricSpec("advantage/*", "", "over the step's episodes", "Other statistics of advantages."),
    _required(
        "mismatch/abs_logprob",
        "nat",
        _TOKENS,
        "Absolute difference of the engine's and the trainer's log-probs of the same tokens "
        "under the same weights; first thing to look at when learning stalls.",
    ),
    _required(
        "mismatch/max",
        "nat",
        "maximum over trained tokens, all ranks",
        "Largest of these differences.",
    ),
    _required(
        "mismatch/k3",
        "nat",
        _TOKENS,
        "KL(engine, trainer) by the k3 estimator: ratio - 1 - log(ratio).",
    ),
    MetricSpec(
        "mismatch/abs_logprob/*/max",
        "nat",
        "maximum over the trained tokens of a role, all ranks",
        "The largest difference of planners' and of workers' tokens.",
    ),
    MetricSpec(
        "mismatch/abs_logprob/*",
        "nat",
        _TOKENS_OF_ROLE,
        "The same for planners and for workers; absent without trained tokens of the role.",
    ),
    MetricSpec("mismatch/k3/*", "nat", _TOKENS_OF_ROLE, "The same for planners and for workers."),
    *(MetricSpec(*row) for row in ASYNC_METRICS),
    MetricSpec("mismatch/*", "", _TOKENS, "Other measures of the engine-trainer difference."),
    _required("loss/policy", "", "mean over the step's updates", "Policy loss that was minimised."),
    MetricSpec(
        "loss/kl",
        "",
        "mean over the step's updates",
        "KL penalty times `algo.kl_coef`, minimised too.",
    ),
    MetricSpec("loss/sft", "nat", _TOKENS, "Cross entropy; supervised runs only."),
    MetricSpec("loss/*", "", "mean over the step's updates", "Other terms of the loss."),
    _required("policy/entropy", "nat", _TOKENS, "Entropy of the trainer's token distribution."),
    _required("policy/clip_frac", "[0, 1]", _TOKENS, "Tokens whose ratio the clip holds back."),
    _required("policy/ratio", "", _TOKENS, "Importance ratio of new and old policy."),
    MetricSpec(
        "policy/kl",
        "nat",
        _TOKENS,
        "KL of the policy and the initial one, by `algo.kl_estimator`; only with `algo.kl_coef`.",
    ),
    *(
        MetricSpec(f"policy/{name}/*", unit, _TOKENS_OF_ROLE, "The same for planners and workers.")
        for name, unit in (
            ("entropy", "nat"),
            ("clip_frac", "[0, 1]"),
            ("ratio", ""),
            ("kl", "nat"),
        )
    ),
    MetricSpec(
        "policy/tis_weight/*",
        "",
        _TOKENS_OF_ROLE,
        "Trainer over engine probability, after cap or mask; only with `algo.tis`.",
    ),
    MetricSpec(
        "policy/tis_held_back/*",
        "[0, 1]",
        "share of the trained tokens of a role, all ranks",
        "Tokens whose weight was capped or masked.",
    ),
    MetricSpec(
        "policy/tis_ess/*",
        "[0, 1]",
        "mean(w)^2 / mean(w^2) over the trained tokens of a role",
        "Effective sample size of the weights, as a share of the tokens.",
    ),
    MetricSpec(
        "policy/tis_ratio/*",
        "",
        "maximum over the trained tokens of a role, all ranks",
        "Trainer over engine probability before cap or mask.",
    ),
    MetricSpec("policy/*", "", _TOKENS, "Other statistics of the policy (KL terms, weights, ...)."),
    _required(
        "optim/grad_norm",
        "",
        "mean over the step's updates",
        "Global gradient norm before clipping.",
    ),
    _required("optim/lr", "", "value of the last update", "Learning rate."),
    _required("optim/updates", "count", "sum", "Optimizer updates in this step."),
    MetricSpec(
        "optim/skipped_updates",
        "count",
        "sum",
        "Updates left out because they were not finite (`train.on_non_finite`); their tokens count "
        "as 0 in the step's means over tokens, and what no update gave is null.",
    ),
    MetricSpec("optim/*", "", "last update", "Other numbers of the optimizer."),
    _required(
        "train/packing_efficiency",
        "[0, 1]",
        "tokens / (micro-batches x `train.micro_batch_tokens`), all ranks and updates",
        "How full the micro-batches are; a longer trajectory fills the one that it is alone in.",
    ),
    _required(
        "tokens/trained",
        "tokens",
        "sum over ranks, each token once",
        "Sampled tokens that carried loss.",
    ),
    MetricSpec(
        "tokens/trained/*",
        "tokens",
        "sum over ranks, each token once",
        "By role of the trajectory.",
    ),
    _required("tokens/sampled", "tokens", "sum", "Tokens that the engines sampled for this step."),
    MetricSpec(
        "tokens/sampled_per_s", "tokens/s", "sum over the collection's wall clock", "Throughput."
    ),
    MetricSpec(
        "tokens/discarded", "tokens", "sum", "Sampled in groups that dynamic sampling discarded."
    ),
    MetricSpec("tokens/context", "tokens", "sum", "Lengths of all contexts."),
    MetricSpec("tokens/*", "tokens", "sum", "Other token counts (context, padding, ...)."),
    MetricSpec(
        "train/tokens_per_s",
        "tokens/s",
        "sum over ranks / `time/train_s`",
        "Tokens of all trained trajectories, prompts and tool replies included.",
    ),
    MetricSpec(
        "train/tflops_per_device",
        "10^12 FLOP/s",
        "mean over the trainer's devices, during `time/train_s`",
        "Model FLOPs by the formula in `config/flops.py`: causal attention, forward and backward "
        "pass, recomputation not counted.",
    ),
    MetricSpec(
        "train/mfu",
        "[0, 1]",
        "mean over the trainer's devices, during `time/train_s`",
        "The same over the device's peak (`train.peak_tflops`, or by its name); absent if unknown.",
    ),
    _required("time/rollout_s", "s", "wall clock", "Waiting for the step's episodes."),
    _required("time/score_s", "s", "wall clock", "Old and reference log-probs."),
    _required("time/train_s", "s", "wall clock", "Forward, backward and optimizer."),
    _required("time/sync_s", "s", "wall clock", "Pushing the weights to the engines."),
    _required("time/step_s", "s", "wall clock", "The whole step."),
    MetricSpec(
        "time/collect_s", "s", "wall clock", "The manager's work on the step; may overlap training."
    ),
    MetricSpec(
        "time/refill_s",
        "s",
        "wall clock",
        "Rounds of dynamic sampling after the first, part of `time/collect_s`.",
    ),
    MetricSpec(
        "memory/peak_gib",
        "GiB",
        "rank 0, since the step before",
        "Most that torch's allocator held on a GPU; only where there is one.",
    ),
    MetricSpec(
        "memory/plan_gib",
        "GiB",
        "rank 0's pipeline stage",
        "What `matpo plan` reckons for it, the reserve left out (docs/memory.md).",
    ),
    MetricSpec("time/*", "s", "wall clock", "Other phases (checkpoint, eval, ...)."),
    MetricSpec("rollout/episodes", "count", "sum", "Episodes of the step, failed ones included."),
    MetricSpec("rollout/failed", "count", "sum", "Episodes left out because of infrastructure."),
    MetricSpec(
        "rollout/failed_by/*",
        "count",
        "sum",
        "The same by status, or `judge_failure`; none: absent.",
    ),
    MetricSpec("rollout/failed_frac", "[0, 1]", "share of the step's episodes", "The same."),
    MetricSpec("rollout/retries", "count", "sum", "Fresh attempts of failed episodes."),
    MetricSpec("rollout/workers_per_planner", "count", _EPISODES, "Worker trajectories."),
    MetricSpec("rollout/answer_found", "[0, 1]", _EPISODES, "An answer could be extracted."),
    MetricSpec("rollout/episode_s_*", "s", "mean or maximum over scored episodes", "Duration."),
    MetricSpec("rollout/turns/*", "turns", _BY_ROLE, "Generations."),
    MetricSpec("rollout/tokens/*", "tokens", _BY_ROLE, "Length of the context."),
    MetricSpec("rollout/format/*", "[0, 1]", _BY_ROLE, "Share of well-formed tool calls."),
    MetricSpec("rollout/calls/*", "count", _BY_ROLE, "Tool and agent calls, malformed ones too."),
    MetricSpec("rollout/call_outcome/*", "[0, 1]", "share of the calls of a role", "By outcome."),
    MetricSpec("rollout/status/*", "[0, 1]", "share of the trajectories of a role", "By status."),
    MetricSpec(
        "rollout/rounds",
        "count",
        "same for all groups",
        "Rounds of questions, the first included; dynamic sampling only.",
    ),
    MetricSpec(
        "rollout/discarded_groups",
        "count",
        "sum",
        "Uninformative groups that others replaced; in no other metric of the rollout.",
    ),
    MetricSpec("rollout/*", "", "as the manager states", "Other numbers of the rollout."),
    MetricSpec("tools/calls", "count", "sum", "Calls to tool servers."),
    MetricSpec("tools/errors", "count", "sum", "Replies that the tool marked as errors."),
    MetricSpec("tools/failures", "count", "sum", "Calls that failed for infrastructure reasons."),
    MetricSpec("tools/latency_s_mean", "s", "mean over answered calls", "Duration of a call."),
    MetricSpec("tools/cache_hits", "count", "sum", "Calls answered from `tools.cache`."),
    MetricSpec("tools/cache_misses", "count", "sum", "Calls that `tools.cache` had no reply for."),
    MetricSpec("tools/urls_blocked", "count", "sum", "Addresses refused or dropped from replies."),
    MetricSpec("tools/restarts", "count", "sum", "Tool servers started or connected to again."),
    MetricSpec("tools/breaker_open", "count", "sum", "Circuit breakers that opened."),
    MetricSpec("tools/*", "", "as the manager states", "Other numbers of the tools."),
    MetricSpec("judge/calls", "count", "sum", "Requests to the LLM judge, repeated ones too."),
    MetricSpec("judge/failures", "count", "sum", "Verdicts that did not come in all attempts."),
    MetricSpec("judge/cache_hits", "count", "sum", "Verdicts that took no request."),
    MetricSpec("judge/latency_s_mean", "s", "mean over answered requests", "Duration."),
    MetricSpec(
        "eval/*/mean@*/low",
        "[0, 1]",
        "bootstrap over the set's questions",
        "Lower end of the mean's interval (`eval.confidence`).",
    ),
    MetricSpec(
        "eval/*/mean@*/high", "[0, 1]", "bootstrap over the set's questions", "Upper end of it."
    ),
    MetricSpec(
        "eval/*/mean@*",
        "[0, 1]",
        "mean over the set's questions",
        "Accuracy of a question's samples, whose largest number is behind the @. `eval/SET/...` is "
        "only in steps with an evaluation (`eval.every`), and in step 0 (`eval.before_train`).",
    ),
    MetricSpec(
        "eval/*/best@*",
        "[0, 1]",
        "mean over the set's questions",
        "Expected best accuracy of k of a question's samples (unbiased; pass@k).",
    ),
    MetricSpec(
        "eval/*/maj@*",
        "[0, 1]",
        "mean over the set's questions",
        "Expected accuracy of the most frequent answer among k of a question's samples.",
    ),
    MetricSpec(
        "eval/*/failed", "count", "sum", "Episodes left out because of infrastructure; never wrong."
    ),
    MetricSpec("eval/*/episodes", "count", "sum", "Episodes of the set, failed ones included."),
    MetricSpec(
        "eval/*/*",
        "",
        "mean over the set's scored episodes",
        "Others: answer_found, format, workers_per_planner, tokens_sampled.",
    ),
)

REQUIRED: frozenset[str] = frozenset(spec.name for spec in METRICS if spec.required)
_EXACT = {spec.name: spec for spec in METRICS if "*" not in spec.name}
_PATTERNS = tuple(spec for spec in METRICS if "*" in spec.name)


def spec_of(name: str) -> MetricSpec:
    """The registry entry for `name`; an exact name wins over a pattern.

    Raises:
        ValueError: the name is not registered.
    """
    exact = _EXACT.get(name)
    if exact is not None:
        return exact
    for spec in _PATTERNS:
        if fnmatchcase(name, spec.name):
            return spec
    raise ValueError(
        f"unknown metric {name!r}: add it to METRICS in megatron_matpo/obs/metrics.py, "
        "with unit and reduction"
    )


def check(values: Mapping[str, float], *, partial: bool = False) -> None:
    """Check the values of one line; a `partial` one may lack required names.

    Raises:
        ValueError: unknown name, not a number, or a required name is missing.
    """
    for name, value in values.items():
        spec_of(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"metric {name!r} must be a number, got {type(value).__name__}")
    missing = sorted(REQUIRED - values.keys() - {"step"})
    if missing and not partial:
        raise ValueError(f"metrics of a step lack {', '.join(missing)}")


def render_docs() -> str:
    """The text of `docs/metrics.md`; a test holds the file to it."""
    head = (
        "# Metrics\n\n"
        "Generated from `megatron_matpo/obs/metrics.py` by\n"
        "`python -m megatron_matpo.obs.metrics > docs/metrics.md`; do not edit.\n\n"
        "Each training step appends one JSON object to `RUN/metrics.jsonl`; the same names go to\n"
        "W&B. Names in bold are in every line. A `*` stands for any further name. A NaN or\n"
        "infinite value is written as `null`. A step of which something stands out also has the\n"
        "text `why`, the line that is printed below its progress ([tracing](tracing.md)).\n\n"
        "| name | unit | reduction | meaning |\n|---|---|---|---|\n"
    )
    rows = (
        f"| {'**`' if spec.required else '`'}{spec.name}{'`**' if spec.required else '`'} "
        f"| {spec.unit} | {spec.reduction} | {spec.description} |\n"
        for spec in METRICS
    )
    return head + "".join(rows)


if __name__ == "__main__":
    print(render_docs(), end="")
