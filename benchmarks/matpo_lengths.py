"""Lengths of a step's trajectories as MATPO makes them, drawn from one seed.

No recording of the original's runs is public, so this is a model of them from what is known (its
scripts and code; arXiv:2510.04678): 256 questions of 8 episodes; a context of 40,960 tokens for
every agent; prompts of up to 3,072 tokens; up to 20 turns, each with a reply or a page
of up to 20,000 characters; a stop 4,096 tokens before the context is full, to leave room for the
summary, so that cut trajectories end near it. The rest is assumed: workers read pages and planners
reports, turn sizes are log-normal, an episode has 2 workers on average. The result: a median of
7,300 tokens, a mean of 10,800, a tenth above 24,000, and 4 % at or near 40,960.
"""

from __future__ import annotations

import random

CONTEXT_TOKENS = 40_960
SUMMARY_TOKENS = 4_096
MAX_TURNS = 20
"""Model turns of one context."""


def matpo_step(seed: int, num_episodes: int = 2048) -> list[list[int]]:
    """Lengths in tokens of a step's trajectories: of each episode its planner, then its workers."""
    rng = random.Random(seed)
    return [_episode(rng) for _ in range(num_episodes)]


def _episode(rng: random.Random) -> list[int]:
    workers = rng.choices(range(6), weights=(10, 30, 28, 17, 10, 5))[0]
    # A delegation is a short turn and a report of some hundred tokens to a few thousand.
    planner = _trajectory(rng, workers + 1, median=900.0, sigma=0.7)
    turns = [min(MAX_TURNS, 1 + int(rng.expovariate(1 / 3.5))) for _ in range(workers)]
    # A search or a page: 20,000 characters are about 5,000 tokens.
    return [planner, *(_trajectory(rng, count, median=1700.0, sigma=1.0) for count in turns)]


def _trajectory(rng: random.Random, num_turns: int, *, median: float, sigma: float) -> int:
    total = rng.randint(1_000, 3_072)
    for _ in range(num_turns):
        total += round(median * rng.lognormvariate(0.0, sigma))
        if total >= CONTEXT_TOKENS - SUMMARY_TOKENS:
            return rng.randint(CONTEXT_TOKENS - SUMMARY_TOKENS // 2, CONTEXT_TOKENS)
    return min(CONTEXT_TOKENS, total + rng.randint(100, 1_000))
