"""Which sample goes into which update, rank and micro-batch. Pure Python, no torch.

Strategy: split by planner episode into updates, pack first, distribute second. Invariants (asserted
by the tests):

* every sample appears exactly once;
* all samples of an episode are in the same update, and updates differ by at most one episode;
* every data-parallel rank gets the same number of micro-batches per update;
* a micro-batch's padded size (samples x longest) is at most the token budget, unless it holds a
  single sample;
* the result depends only on the arguments (same on every rank, no communication).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from megatron_matpo.types import TrainSample

Bin = list[TrainSample]
"""Samples of one micro-batch; empty bins only pad the number of micro-batches."""


def split_updates(samples: Sequence[TrainSample], num_updates: int) -> list[list[TrainSample]]:
    """Split a step's samples into `num_updates` by whole episodes, in order.

    Fewer updates come back if there are fewer episodes than updates.
    """
    episodes: dict[str, list[TrainSample]] = {}
    for sample in samples:
        episodes.setdefault(sample.episode_id, []).append(sample)
    trees = list(episodes.values())
    num_updates = min(num_updates, len(trees))
    bounds = [len(trees) * i // num_updates for i in range(num_updates + 1)] if trees else [0]
    return [
        [sample for tree in trees[first:last] for sample in tree]
        for first, last in pairwise(bounds)
    ]


def pack(samples: Sequence[TrainSample], budget_tokens: int) -> list[Bin]:
    """Rectangular micro-batches: neighbours in length order, padded to the longest."""
    bins: list[Bin] = []
    longest = 0
    for sample in sorted(samples, key=lambda item: (-len(item.input_ids), item.trajectory_id)):
        if bins and (len(bins[-1]) + 1) * longest <= budget_tokens:
            bins[-1].append(sample)
        else:
            bins.append([sample])
            longest = len(sample.input_ids)
    return bins


def padded_tokens(batch: Bin) -> int:
    """Size of a micro-batch after right padding."""
    return len(batch) * max((len(sample.input_ids) for sample in batch), default=0)


def schedule(samples: Sequence[TrainSample], budget_tokens: int, num_ranks: int) -> list[list[Bin]]:
    """Micro-batches of one update: entry r is the list of data-parallel rank r."""
    bins = pack(samples, budget_tokens)
    while len(bins) % num_ranks:
        largest = max(bins, key=padded_tokens)
        if len(largest) < 2:
            bins.append([])
            continue
        bins.remove(largest)
        middle = len(largest) // 2
        bins += [largest[:middle], largest[middle:]]
    bins.sort(key=padded_tokens, reverse=True)
    per_rank = len(bins) // num_ranks
    loads = [0] * num_ranks
    result: list[list[Bin]] = [[] for _ in range(num_ranks)]
    for item in bins:
        rank = min(
            (r for r in range(num_ranks) if len(result[r]) < per_rank), key=lambda r: (loads[r], r)
        )
        result[rank].append(item)
        loads[rank] += padded_tokens(item)
    return result


def num_trained_tokens(samples: Sequence[TrainSample]) -> int:
    """The loss denominator: sampled tokens of all trajectories, workers included."""
    return sum(sum(sample.loss_mask) for sample in samples)
