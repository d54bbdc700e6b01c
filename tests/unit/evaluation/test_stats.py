"""Proves every statistic against brute force: all subsets, all resamples, in float64.

Does not prove that an interval covers the truth as often as its level says (a bootstrap of few
questions does not).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import combinations, product

import pytest

from megatron_matpo.evaluation.stats import (
    best_at,
    bootstrap,
    ks_up_to,
    majority_at,
    mean_at,
    quantile,
)

RNG = random.Random(7)
CASES = [
    [RNG.choice([0.0, 1.0]) if binary else RNG.random() for _ in range(n)]
    for n in (1, 2, 3, 5, 8)
    for binary in (True, True, False)
]


def brute_force(n, k, value):
    """Mean of `value` over all subsets of k of n places."""
    values = [value(chosen) for chosen in combinations(range(n), k)]
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("accuracies", CASES)
def test_best_at_is_the_mean_maximum_of_all_subsets(accuracies):
    n = len(accuracies)
    for k in range(1, n + 1):
        expected = brute_force(n, k, lambda chosen: max(accuracies[i] for i in chosen))
        assert best_at(accuracies, k) == pytest.approx(expected, abs=1e-12)
    assert best_at(accuracies, 1) == pytest.approx(mean_at(accuracies), abs=1e-12)


@pytest.mark.parametrize(("n", "right"), [(8, 0), (8, 1), (8, 3), (8, 8), (64, 5)])
def test_best_at_of_right_and_wrong_is_pass_at_k(n, right):
    accuracies = [1.0] * right + [0.0] * (n - right)
    for k in range(1, n + 1):
        expected = 1 - math.comb(n - right, k) / math.comb(n, k)
        assert best_at(accuracies, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("accuracies", CASES)
def test_the_mean_of_k_samples_does_not_depend_on_k(accuracies):
    n = len(accuracies)
    for k in range(1, n + 1):
        expected = brute_force(n, k, lambda chosen, k=k: sum(accuracies[i] for i in chosen) / k)
        assert mean_at(accuracies) == pytest.approx(expected, abs=1e-12)


def vote(answers, accuracies, chosen):
    """Accuracy of the winner among `chosen`; ties are averaged over the tied answers."""
    votes = Counter(answers[i] for i in chosen if answers[i] is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    tied = [answer for answer, count in votes.items() if count == most]
    # The expectation over the chosen samples of that answer: their own accuracies.
    means = []
    for answer in tied:
        own = [accuracies[i] for i in chosen if answers[i] == answer]
        means.append(sum(own) / len(own))
    return sum(means) / len(means)


@pytest.mark.parametrize("seed", range(40))
def test_majority_at_is_the_mean_vote_of_all_subsets(seed):
    rng = random.Random(seed)
    n = rng.randint(1, 9)
    answers = [rng.choice(["a", "b", "c", None, "d"][: rng.randint(1, 5)]) for _ in range(n)]
    if seed % 2:  # one text is always right or always wrong
        grade = {answer: rng.choice([0.0, 1.0]) for answer in set(answers)}
        accuracies = [grade[answer] for answer in answers]
    else:  # a judge that is not consistent
        accuracies = [rng.random() for _ in answers]
    for k in range(1, n + 1):
        expected = brute_force(n, k, lambda chosen: vote(answers, accuracies, chosen))
        assert majority_at(answers, accuracies, k) == pytest.approx(expected, abs=1e-12)


def test_rules_of_the_vote():
    assert majority_at(["x", "x", "y"], [1.0, 1.0, 0.0], 3) == 1.0
    assert majority_at(["x", "y"], [1.0, 0.0], 2) == 0.5  # a tie
    assert majority_at([None, None, "x"], [0.0, 0.0, 1.0], 3) == 1.0  # silence is no vote
    assert majority_at([None, None], [0.0, 0.0], 2) == 0.0  # nobody votes
    assert majority_at([None, "x"], [0.0, 1.0], 1) == 0.5


def test_many_distinct_answers_are_counted_quickly_and_rightly():
    n = 64
    accuracies = [float(i < 16) for i in range(n)]
    value = majority_at([f"answer {i}" for i in range(n)], accuracies, 32)
    assert value == pytest.approx(0.25, abs=1e-12)
    split = ["right"] * 40 + ["wrong"] * 24
    assert majority_at(split, [1.0] * 40 + [0.0] * 24, n) == 1.0


def test_k_beyond_the_samples_is_a_bug_of_the_caller():
    with pytest.raises(AssertionError):
        best_at([1.0], 2)
    with pytest.raises(AssertionError):
        majority_at(["x"], [1.0], 2)


@pytest.mark.parametrize(
    ("n", "ks"), [(1, []), (2, [2]), (3, [2, 3]), (4, [2, 4]), (8, [2, 4, 8]), (9, [2, 4, 8, 9])]
)
def test_which_k_are_reported(n, ks):
    assert ks_up_to(n) == ks


def test_quantiles_are_linear_between_neighbours():
    assert quantile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 4.0], 0.75) == 3.0
    assert quantile([1.0, 2.0, 4.0], 0.0) == 1.0
    assert quantile([1.0, 2.0, 4.0], 1.0) == 4.0


@pytest.mark.parametrize("values", [[0.0, 1.0, 1.0, 0.5, 0.0], [0.2, 0.9, 0.4]])
@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
def test_the_interval_is_that_of_all_resamples(values, confidence):
    n = len(values)
    means = sorted(sum(chosen) / n for chosen in product(values, repeat=n))
    estimate = bootstrap(values, confidence=confidence, num_resamples=40_000, seed=3)
    assert estimate.value == pytest.approx(sum(values) / n, abs=1e-12)
    assert estimate.num_questions == n
    # The drawn quantile lies between the exact ones of slightly smaller and larger shares.
    tail = (1 - confidence) / 2
    for got, share in ((estimate.low, tail), (estimate.high, 1 - tail)):
        below = means[max(0, math.floor((share - 0.01) * len(means)))]
        above = means[min(len(means) - 1, math.ceil((share + 0.01) * len(means)))]
        assert below - 1e-12 <= got <= above + 1e-12


def test_equal_seeds_give_equal_intervals_and_one_question_gives_none():
    values = [RNG.random() for _ in range(30)]
    first, again, other = (
        bootstrap(values, confidence=0.9, num_resamples=500, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.low < first.value < first.high
    alone = bootstrap([0.25], confidence=0.9, num_resamples=500, seed=1)
    assert (alone.value, alone.low, alone.high, alone.num_questions) == (0.25, 0.25, 0.25, 1)
