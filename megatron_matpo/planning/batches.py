"""How many micro-batches an update has: lengths given or assumed, packed to the token budget."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import NormalDist

from megatron_matpo.config import Config
from megatron_matpo.errors import ConfigError

ASSUMED_WORKERS = 3.2
"""Worker trajectories per planner, where nothing is known: what the MATPO code's updates per
iteration come to (4.2 with the planner's own)."""
ASSUMED_MEAN_FRAC = 0.25
"""Mean length of a trajectory, as a share of `rollout.context_length`: an assumption."""
_SIGMA = 0.8
"""Of the assumed log-normal distribution: the longest percent is some six times the median."""


@dataclass(frozen=True)
class Workload:
    """What one step trains on."""

    lengths: tuple[int, ...]
    """Tokens of every trajectory of a step."""
    assumption: str
    """Where the lengths come from, for the output."""

    @cached_property
    def length_seen(self) -> float:
        """Length of the trajectory that a token is in, on average over tokens."""
        return sum(n * n for n in self.lengths) / sum(self.lengths)


def assumed_workload(config: Config, mean_tokens: int = 0, workers: float = -1.0) -> Workload:
    """Log-normal lengths, clipped at the context length, with the mean that is given or assumed.

    Args:
        config: gives episodes per step and the context length.
        mean_tokens: of a trajectory; 0 assumes a quarter of the context length.
        workers: per planner; negative assumes 3.2, or 0 without worker agents.
    """
    limit = config.rollout.context_length
    mean = mean_tokens or max(1, round(ASSUMED_MEAN_FRAC * limit))
    if mean > limit:
        raise ConfigError(f"--mean-tokens={mean}: more than rollout.context_length={limit}")
    if workers < 0:
        workers = ASSUMED_WORKERS if _has_workers(config) else 0.0
    episodes = config.data.prompts_per_step * config.data.samples_per_prompt
    count = max(1, round(episodes * (1 + workers)))
    whence = "given" if mean_tokens else "assumed"
    return Workload(
        tuple(_log_normal(count, mean, limit)),
        f"{episodes} episodes with {workers:g} workers each; lengths log-normal (sigma {_SIGMA:g}) "
        f"up to {limit}, mean {mean} ({whence})",
    )


def measured_workload(config: Config, file: str) -> Workload:
    """Lengths from a text file, one whole number per line; repeated or cut to the step's size.

    Raises:
        ConfigError: no such file, or a line that is no length.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").split()
        known = [int(line) for line in lines]
    except (OSError, ValueError) as error:
        problem = f"--lengths={file}: expected one whole number per line ({error})"
        raise ConfigError(problem) from error
    limit = config.rollout.context_length
    if not known or min(known) < 1 or max(known) > limit:
        raise ConfigError(
            f"--lengths={file}: expected lengths from 1 to rollout.context_length={limit}"
        )
    episodes = config.data.prompts_per_step * config.data.samples_per_prompt
    workers = ASSUMED_WORKERS if _has_workers(config) else 0.0
    count = max(1, round(episodes * (1 + workers)))
    lengths = tuple(known[i % len(known)] for i in range(count))
    return Workload(
        lengths,
        f"{episodes} episodes with {workers:g} workers each; {len(known)} lengths from {file}",
    )


def micro_batches_per_rank(workload: Workload, budget: int, ranks: int, updates: int) -> int:
    """Micro-batches of an update on one data-parallel rank.

    Best-fit-decreasing packing of an even share of the step's trajectories; longer ones than the
    budget are alone. All ranks have equally many.
    """
    return max(1, -(-_bins_of_update(workload.lengths, budget, updates) // ranks))


@lru_cache(maxsize=4)
def _bins_of_update(lengths: tuple[int, ...], budget: int, updates: int) -> int:
    """The same for every layout, of which `matpo plan` looks at hundreds."""
    return count_bins(sorted(lengths, reverse=True)[::updates], budget)


def count_bins(lengths: Sequence[int], budget: int) -> int:
    """Micro-batches of at most `budget` tokens, best fit; `lengths` from the longest."""
    room: list[int] = []
    count = 0
    for length in lengths:
        place = bisect_left(room, length)
        if place < len(room):
            free = room.pop(place)
        else:
            free, count = budget, count + 1
        if free > length:
            insort(room, free - length)
    return count


def _has_workers(config: Config) -> bool:
    planner = config.agents.get(config.rollout.planner)
    names = planner.tools if planner else []
    return any(name in config.agents and config.agents[name].role == "worker" for name in names)


def _log_normal(count: int, mean: int, limit: int) -> list[int]:
    """The distribution's quantiles, scaled until the clipped values have the mean."""
    shape = [NormalDist(0.0, _SIGMA).inv_cdf((i + 0.5) / count) for i in range(count)]
    low, high = 0.0, 64.0 * limit
    for _ in range(60):
        scale = (low + high) / 2
        total = sum(min(limit, scale * math.exp(value)) for value in shape)
        low, high = (scale, high) if total < mean * count else (low, scale)
    return [max(1, min(limit, round(low * math.exp(value)))) for value in shape]
