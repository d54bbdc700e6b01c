"""mean@k, best@k and majority@k of repeated answers, and bootstrap intervals. Pure, float64.

Samples of one question are pooled whatever row or request they came from. With n samples:

* `mean_at`: their mean; the expectation of the mean of k samples is the same for every k <= n.
* `best_at(k)`: expected maximum of k of the n samples, drawn without replacement. For right or
  wrong answers with c right ones this is 1 - C(n-c, k) / C(n, k), the unbiased pass@k.
* `majority_at(k)`: expected accuracy of the most frequent answer among k of the n samples, drawn
  without replacement. Exact: all subsets are counted, none is drawn. Answers are equal if their
  normalised texts are. A tie is broken at random, so tied answers share the probability evenly. A
  sample without an answer casts no vote; where nobody votes, the accuracy is 0. The accuracy of an
  answer is the mean over the samples that gave it (a judge may grade one text both ways).

Source: Chen et al. 2021 (arXiv:2107.03374), Eq. 1, for best@k; Wang et al. 2022 (arXiv:2203.11171)
for the majority. Differs from verl's `process_validation_metrics`, with which MATPO validates:
there best@k and maj@k are means over seeded draws with replacement, and a tie goes to the answer
that came first.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions with its interval."""

    value: float
    low: float
    high: float
    """Equal to `low` and `value` where there are fewer than two questions to resample."""
    num_questions: int


def mean_at(accuracies: Sequence[float]) -> float:
    """Mean accuracy of a question's samples, at least one."""
    return math.fsum(accuracies) / len(accuracies)


def best_at(accuracies: Sequence[float], k: int) -> float:
    """Expected maximum of `k` samples drawn without replacement from `accuracies` (len >= k >= 1).

    The sample at place i (from 1) of the ascending order is the maximum of C(i-1, k-1) subsets.
    """
    total = math.comb(len(accuracies), k)
    assert k >= 1 and total > 0, "k is at least 1 and at most the number of samples"
    ordered = enumerate(sorted(accuracies))
    return math.fsum(value * (math.comb(place, k - 1) / total) for place, value in ordered)


def majority_at(answers: Sequence[Hashable | None], accuracies: Sequence[float], k: int) -> float:
    """Expected accuracy of the most frequent of `k` answers drawn without replacement.

    Args:
        answers: [n] normalised answers of one question; None: no answer.
        accuracies: [n] of the same samples.
        k: between 1 and n.
    """
    graded: dict[Hashable, list[float]] = {}
    for answer, accuracy in zip(answers, accuracies, strict=True):
        if answer is not None:
            graded.setdefault(answer, []).append(accuracy)
    num_silent = len(answers) - sum(map(len, graded.values()))
    sizes = Counter(len(items) for items in graded.values())
    terms: list[float] = []
    for items in graded.values():
        others = sizes - Counter((len(items),))
        wins = _win_probability(len(items), tuple(sorted(others.elements())), num_silent, k)
        terms.append(wins * mean_at(items))
    return math.fsum(terms)


@lru_cache(maxsize=4096)
def _win_probability(size: int, others: tuple[int, ...], num_silent: int, k: int) -> float:
    """Probability that an answer given by `size` samples wins the vote of `k` drawn ones.

    `others` are the numbers of samples behind the other answers. With j votes for the answer, the
    subsets in which no other answer has more are counted by how many others have j votes too.
    """
    total = math.comb(size + sum(others) + num_silent, k)
    assert k >= 1 and total > 0, "k is at least 1 and at most the number of samples"
    terms: list[float] = []
    for votes in range(1, min(size, k) + 1):
        # (samples drawn, answers tied with ours) -> number of ways
        ways = {(drawn, 0): math.comb(num_silent, drawn) for drawn in range(num_silent + 1)}
        for other in others:
            ways = _with_answer(ways, other, votes, k - votes)
        ours = math.comb(size, votes)
        terms += [
            ours * count / (total * (1 + num_tied))
            for (drawn, num_tied), count in ways.items()
            if drawn == k - votes
        ]
    return math.fsum(terms)


def _with_answer(
    ways: dict[tuple[int, int], int], size: int, votes: int, most: int
) -> dict[tuple[int, int], int]:
    """`ways` with one more answer of `size` samples that gets at most `votes` of them drawn."""
    result: dict[tuple[int, int], int] = {}
    for (drawn, num_tied), count in ways.items():
        for own in range(min(size, votes, most - drawn) + 1):
            key = (drawn + own, num_tied + (own == votes))
            result[key] = result.get(key, 0) + count * math.comb(size, own)
    return result


def ks_up_to(num_samples: int) -> list[int]:
    """The k that are reported for `num_samples` samples: powers of two from 2, and all samples."""
    powers = [2**i for i in range(1, num_samples.bit_length()) if 2**i < num_samples]
    return [*powers, num_samples] if num_samples > 1 else []


def bootstrap(
    values: Sequence[float], *, confidence: float, num_resamples: int, seed: int
) -> Estimate:
    """Mean of one value per question, with the percentile interval over resampled questions.

    Args:
        values: at least one.
        confidence: level of the interval, in (0, 1).
        num_resamples: how often as many questions are drawn with replacement.
        seed: equal arguments give equal intervals.
    """
    mean = mean_at(values)
    if len(values) < 2:
        return Estimate(mean, mean, mean, len(values))
    draw = random.Random(f"bootstrap-{seed}")
    means = sorted(mean_at(draw.choices(values, k=len(values))) for _ in range(num_resamples))
    tail = (1.0 - confidence) / 2
    low, high = quantile(means, tail), quantile(means, 1.0 - tail)
    return Estimate(mean, low, high, len(values))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Quantile of ascending values, linear between neighbours (numpy's default)."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
