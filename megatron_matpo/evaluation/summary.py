"""From results of episodes to the figures of a set: what the table, the file and W&B show.

Denominators: every figure but the counts is a mean over questions (each counts once, whatever the
number of its samples that came) or, where it says episodes, over scored episodes. Episodes that
failed for reasons outside the model are in none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_matpo.config.evaluation import EvalConfig
from megatron_matpo.data.dataset import shown_source
from megatron_matpo.evaluation.results import EpisodeResult
from megatron_matpo.evaluation.stats import (
    Estimate,
    best_at,
    bootstrap,
    ks_up_to,
    majority_at,
    mean_at,
)
from megatron_matpo.rewards.graders import normalize

NO_LEVEL = "(none)"
# FRAMES lists several reasoning types of one question so.
_TYPE_SEPARATOR = " | "


@dataclass(frozen=True, slots=True)
class SetSummary:
    """The figures of one evaluation set."""

    name: str
    num_questions: int
    num_samples: int
    """Samples of a question: rows that are copies of it times `eval.samples_per_row`; the largest
    number if questions differ."""
    num_episodes: int
    num_missing: int
    """Episodes without a verdict; they are asked again when `matpo eval` is resumed."""
    failures: dict[str, int]
    """Missing episodes by reason."""
    measures: dict[str, Estimate]
    """`mean@n`, then `best@k` and `maj@k` for growing k; best@k and maj@k are over the questions
    with at least k scored samples."""
    breakdowns: dict[str, dict[str, Estimate]]
    """`level`, `type` and `data_source` -> value -> mean@n; only those with two values or more."""
    data_sources: list[str]
    planner_statuses: dict[str, float]
    """Share of the scored episodes."""
    worker_statuses: dict[str, float]
    """Share of the workers of scored episodes."""
    answered: float
    """Share of scored episodes in which an answer was found."""
    format: float
    workers: float
    """Mean over scored episodes; so are the tokens and seconds."""
    context_tokens: float
    sampled_tokens: float
    duration_s: float

    @property
    def mean_label(self) -> str:
        """Name of the mean among `measures`."""
        return f"mean@{self.num_samples}"

    @property
    def mean(self) -> Estimate:
        """mean@n."""
        return self.measures[self.mean_label]


def summarize(
    name: str, results: Sequence[EpisodeResult], config: EvalConfig, seed: int
) -> SetSummary:
    """Figures of a set.

    Args:
        name: of the set.
        results: one for every episode that was wanted, at least one; those without accuracy count
            as missing.
        config: level of the intervals and number of resamples.
        seed: of the resampling.
    """
    scored = [item for item in results if item.accuracy is not None]
    samples = Counter(item.question_key for item in results)
    num_samples = max(samples.values())
    questions = _by_question(scored)

    def estimate(values: Sequence[float]) -> Estimate:
        if not values:
            return Estimate(float("nan"), float("nan"), float("nan"), 0)
        return bootstrap(
            values,
            confidence=config.confidence,
            num_resamples=config.num_resamples,
            seed=seed,
        )

    workers = [item.worker_statuses for item in scored]
    return SetSummary(
        name=name,
        num_questions=len(samples),
        num_samples=num_samples,
        num_episodes=len(results),
        num_missing=len(results) - len(scored),
        failures=_counted(item.failure for item in results if item.accuracy is None),
        measures=_measures(questions, num_samples, estimate),
        breakdowns=_breakdowns(scored, estimate),
        data_sources=sorted({item.data_source for item in results}),
        planner_statuses=_shares(Counter(item.status for item in scored)),
        worker_statuses=_shares(sum((Counter(item) for item in workers), Counter[str]())),
        answered=_mean(bool(item.answer) for item in scored),
        format=_mean(item.format or 0.0 for item in scored),
        workers=_mean(item.num_workers for item in scored),
        context_tokens=_mean(item.context_tokens for item in scored),
        sampled_tokens=_mean(item.sampled_tokens for item in scored),
        duration_s=_mean(item.duration_s for item in scored),
    )


def metrics(summary: SetSummary) -> dict[str, float]:
    """`eval/SET/...` of `docs/metrics.md`."""
    values: dict[str, float] = {name: item.value for name, item in summary.measures.items()}
    values |= {
        f"{summary.mean_label}/low": summary.mean.low,
        f"{summary.mean_label}/high": summary.mean.high,
        "answer_found": summary.answered,
        "format": summary.format,
        "workers_per_planner": summary.workers,
        "tokens_sampled": summary.sampled_tokens,
        "episodes": summary.num_episodes,
        "failed": summary.num_missing,
    }
    return {f"eval/{summary.name}/{name}": float(value) for name, value in values.items()}


def _by_question(scored: Iterable[EpisodeResult]) -> dict[str, list[EpisodeResult]]:
    """Question key -> its samples, in the order of rows and samples."""
    found: dict[str, list[EpisodeResult]] = {}
    for item in scored:
        found.setdefault(item.question_key, []).append(item)
    return found


def _accuracies(items: Iterable[EpisodeResult]) -> list[float]:
    return [item.accuracy for item in items if item.accuracy is not None]


def _measures(
    questions: Mapping[str, list[EpisodeResult]],
    num_samples: int,
    estimate: Callable[[Sequence[float]], Estimate],
) -> dict[str, Estimate]:
    measures = {
        f"mean@{num_samples}": estimate([mean_at(_accuracies(q)) for q in questions.values()])
    }
    for k in ks_up_to(num_samples):
        enough = [items for items in questions.values() if len(items) >= k]
        best = [best_at(_accuracies(items), k) for items in enough]
        votes = [majority_at(_votes(items), _accuracies(items), k) for items in enough]
        measures |= {f"best@{k}": estimate(best), f"maj@{k}": estimate(votes)}
    return measures


def _votes(items: Iterable[EpisodeResult]) -> list[str | None]:
    """Normalised answers; None where there is none."""
    return [normalize(item.answer) if item.answer else None for item in items]


def _breakdowns(
    scored: Sequence[EpisodeResult], estimate: Callable[[Sequence[float]], Estimate]
) -> dict[str, dict[str, Estimate]]:
    """Means by level, by type (a question may have several) and by data source."""
    keys: dict[str, Callable[[EpisodeResult], list[str]]] = {
        "level": lambda item: [item.level or NO_LEVEL],
        "type": lambda item: (item.question_type or NO_LEVEL).split(_TYPE_SEPARATOR),
        "data_source": lambda item: [shown_source(item.data_source)],
    }
    result: dict[str, dict[str, Estimate]] = {}
    for name, values_of in keys.items():
        parts: dict[str, list[EpisodeResult]] = {}
        for item in scored:
            for value in values_of(item):
                parts.setdefault(value.strip(), []).append(item)
        if len(parts) > 1:
            result[name] = {
                value: estimate([mean_at(_accuracies(q)) for q in _by_question(items).values()])
                for value, items in sorted(parts.items())
            }
    return result


def _shares(counts: Counter[str]) -> dict[str, float]:
    return {name: count / counts.total() for name, count in counts.most_common()}


def _counted(reasons: Iterable[str]) -> dict[str, int]:
    return dict(Counter(reasons).most_common())


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return sum(items) / len(items) if items else float("nan")
