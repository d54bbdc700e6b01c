"""Least squares without derivatives: Nelder and Mead's simplex over positive parameters.

Source: Nelder and Mead, A simplex method for function minimization, 1965 (reflection 1, expansion
2, contraction and shrinkage 1/2). Parameters are searched as logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

_FIRST_STEP = 0.7
"""Of the simplex, in log units: a factor of 2."""


def minimise(
    loss: Callable[[Sequence[float]], float], start: Sequence[float], max_calls: int
) -> list[float]:
    """The best parameters found within `max_calls` calls of `loss`; deterministic."""
    calls = 0

    def at(point: list[float]) -> tuple[float, list[float]]:
        nonlocal calls
        calls += 1
        return loss([math.exp(value) for value in point]), point

    first = [math.log(value) for value in start]
    simplex = [at(first)]
    for index in range(len(first)):
        simplex.append(at([v + _FIRST_STEP * (i == index) for i, v in enumerate(first)]))
    while calls < max_calls:
        simplex.sort(key=lambda item: item[0])
        *others, worst = simplex
        middle = [sum(column) / len(others) for column in zip(*(p for _, p in others), strict=True)]

        def along(factor: float, worst: list[float], middle: list[float]) -> list[float]:
            return [m + factor * (m - w) for m, w in zip(middle, worst, strict=True)]

        tried = at(along(1.0, worst[1], middle))
        if tried[0] < others[0][0]:
            further = at(along(2.0, worst[1], middle))
            tried = min(tried, further)
        elif tried[0] >= others[-1][0]:
            nearer = at(along(0.5 if tried[0] < worst[0] else -0.5, worst[1], middle))
            if nearer[0] >= min(tried[0], worst[0]):
                best = simplex[0][1]
                simplex = [
                    simplex[0],
                    *(
                        at([(a + b) / 2 for a, b in zip(best, point, strict=True)])
                        for _, point in simplex[1:]
                    ),
                ]
                continue
            tried = nearer
        simplex = [*others, tried]
    return [math.exp(value) for value in min(simplex, key=lambda item: item[0])[1]]


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(intercept, slope) of least squares, neither negative; one of them is 0 if it would be."""
    n = len(xs)
    mean_x, mean_y = sum(xs) / n, sum(ys) / n
    spread = sum((x - mean_x) ** 2 for x in xs)
    product = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    slope = product / spread if spread else 0.0
    intercept = mean_y - slope * mean_x
    if spread == 0 or intercept < 0:
        return 0.0, sum(x * y for x, y in zip(xs, ys, strict=True)) / sum(x * x for x in xs)
    return (mean_y, 0.0) if slope < 0 else (intercept, slope)
