"""Which sample goes into which update, rank and micro-batch, and what it weighs. No torch.

Strategy: split by planner episode into updates, pack first, distribute second. A micro-batch is one
packed row: the samples' tokens one after another. Invariants (asserted by the tests):

* every sample appears exactly once;
* all samples of an episode are in the same update, and updates differ by at most one episode;
* every data-parallel rank gets the same number of micro-batches per update, at least one;
* a micro-batch's tokens are at most the token budget, unless it holds a single sample;
* there are as few micro-batches as best-fit-decreasing packing finds, rounded up to a multiple of
  the number of ranks;
* ranks differ in estimated cost (`_cost`) by at most the dearest micro-batch;
* the result depends only on the set of samples (same on every rank, no communication).

`compat: reference` splits by trajectories instead (`split_by_trajectories`): then the second
invariant does not hold.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush, heapreplace
from itertools import pairwise

from megatron_matpo.types import Role, TrainSample

Bin = list[TrainSample]
"""Samples of one micro-batch; empty bins only pad the number of micro-batches."""

_EVEN_TOKENS = 32768
"""Length at which causal attention takes as long as the linear layers. By operations it is (weights
of a layer) / (heads x head size): 25k for Qwen3-4B, 47k for 8B, 65k for 14B; attention kernels come
less close to a GPU's peak than matrix products. Only the balance depends on it."""


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


def split_by_trajectories(
    samples: Sequence[TrainSample], num_updates: int
) -> list[list[TrainSample]]:
    """Split as the original MATPO code does: the size of an update is a number of rows (C6).

    An update holds as many trajectories as `num_updates` equal shares of the planners would, and
    there are as many updates as the trajectories, workers included, fill: with one update per step
    and w workers per planner 1 + w. `samples` holds all planners, then all workers, so that a
    planner and its workers can fall into different updates, and the last update can be small.

    Source: MATPO `verl/workers/fsdp_workers.py:146`, `verl/workers/actor/dp_actor.py:348`.
    Differs: rows are not first reordered by length among data-parallel ranks (`balance_batch`),
    and left-out episodes make an update smaller; there one failure ended the step.
    """
    rows = reference_rows(samples, num_updates)
    return [list(samples[first : first + rows]) for first in range(0, len(samples), rows)]


def reference_rows(samples: Sequence[TrainSample], num_updates: int) -> int:
    """Trajectories of a full update in `split_by_trajectories`."""
    num_planners = sum(sample.role is Role.PLANNER for sample in samples)
    return max(1, math.ceil(num_planners / num_updates))


def weigh(samples: Sequence[TrainSample], aggregation: str) -> list[TrainSample]:
    """The samples of one update with the loss weights of `algo.aggregation`.

    The loss is the sum over all trained tokens of value x weight, divided by `total_weight` of the
    same samples, so it depends neither on packing nor on the layout:

    * `token`: every trained token weighs the same, workers' too (DAPO, arXiv:2503.14476, Sec. 3.3);
    * `trajectory`: mean over trajectories of the mean over their trained tokens (GRPO,
      arXiv:2402.03300, Eq. 3). A worker's trajectory counts as much as a planner's, so an episode
      counts more the more workers it has;
    * `episode`: mean over planner episodes of the mean over the trained tokens of planner and
      workers together: every episode counts the same.

    Dr. GRPO (arXiv:2503.20783) divides by a constant, so that every token weighs the same across
    updates too; within one update that is `token` times a factor.
    """
    if aggregation == "token":
        return list(samples)
    tokens: Counter[str] = Counter()
    for sample in samples:
        tokens[_unit(sample, aggregation)] += sum(sample.loss_mask)
    return [
        replace(sample, loss_weight=1.0 / max(1, tokens[_unit(sample, aggregation)]))
        for sample in samples
    ]


def _unit(sample: TrainSample, aggregation: str) -> str:
    """What the loss is a mean over."""
    return sample.episode_id if aggregation == "episode" else sample.trajectory_id


def total_weight(samples: Sequence[TrainSample]) -> float:
    """The loss denominator of an update; with `token` its number of trained tokens.

    1 if nothing is trained, so that dividing by it is harmless.
    """
    total = math.fsum(sample.loss_weight * sum(sample.loss_mask) for sample in samples)
    return total if total > 0 else 1.0


def schedule(
    samples: Sequence[TrainSample], budget_tokens: int, num_ranks: int, multiple: int = 1
) -> list[list[Bin]]:
    """Micro-batches of one update: entry r is the list of data-parallel rank r.

    Args:
        samples: of the whole update.
        budget_tokens: upper bound of a micro-batch's tokens; a longer sample is alone in one.
        num_ranks: data-parallel ranks.
        multiple: what a sample's length is rounded up to before it counts (context parallelism).
    """
    ordered = sorted(samples, key=lambda item: (-len(item.input_ids), item.trajectory_id))
    sizes = [-(-len(sample.input_ids) // multiple) * multiple for sample in ordered]
    packed = _pack(sizes, budget_tokens)
    per_rank = max(1, -(-len(packed) // num_ranks))
    plan = _spread(sizes, budget_tokens, num_ranks, per_rank)
    if not plan:
        bins = _split(packed, sizes, per_rank * num_ranks)
        plan = _distribute(bins, [sum(_cost(sizes[i]) for i in item) for item in bins], num_ranks)
    return [[[ordered[i] for i in item] for item in of_rank] for of_rank in plan]


def num_tokens(samples: Sequence[TrainSample]) -> int:
    """Tokens of `samples`: the length of a packed row."""
    return sum(len(sample.input_ids) for sample in samples)


def packed_room(plan: Sequence[Sequence[Bin]], budget_tokens: int) -> int:
    """Tokens that the micro-batches of a `schedule` have room for, empty ones included.

    One that holds a sample longer than the budget counts with that sample's length.
    """
    return sum(max(budget_tokens, num_tokens(item)) for bins in plan for item in bins)


def _cost(tokens: int) -> float:
    """Estimated time of a sample, in tokens of a short one: linear layers, then attention."""
    return tokens * (1.0 + tokens / _EVEN_TOKENS)


def _pack(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Best fit: each of the decreasing `sizes` into the fullest bin that has room; bins of indices.

    At most 11/9 of the fewest possible bins, plus a constant (D. Johnson, "Near-optimal bin packing
    algorithms", 1973); with many small items close to the fewest.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index, size in enumerate(sizes):
        place = bisect_left(room, (size, -1))
        if place < len(room):
            free, chosen = room.pop(place)
        else:
            free, chosen = budget, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if free > size:
            insort(room, (free - size, chosen))
    return bins


def _spread(
    sizes: Sequence[int], budget: int, num_ranks: int, per_rank: int
) -> list[list[list[int]]]:
    """Each of the decreasing `sizes` to the cheapest rank, there into the emptiest bin.

    The even way, for when there is room. [] if a size does not fit so.
    """
    bins: list[list[list[int]]] = [[[] for _ in range(per_rank)] for _ in range(num_ranks)]
    emptiest = [[(-budget, i) for i in range(per_rank)] for _ in range(num_ranks)]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for index, size in enumerate(sizes):
        cost, rank = heap[0]
        minus_free, chosen = emptiest[rank][0]
        # Only an empty bin takes a sample that is longer than the budget.
        if -minus_free < min(size, budget):
            return []
        bins[rank][chosen].append(index)
        heapreplace(emptiest[rank], (minus_free + size, chosen))
        heapreplace(heap, (cost + _cost(size), rank))
    return bins


def _split(bins: Sequence[list[int]], sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    """Halve the bins with most tokens until there are `num_bins`; the rest stays empty."""
    heap = [(-sum(sizes[i] for i in item), item) for item in bins if len(item) > 1]
    done = [item for item in bins if len(item) <= 1]
    heapify(heap)
    while heap and len(heap) + len(done) < num_bins:
        _, item = heappop(heap)
        for half in (item[::2], item[1::2]):
            if len(half) > 1:
                heappush(heap, (-sum(sizes[i] for i in half), half))
            else:
                done.append(half)
    result = done + [item for _, item in heap]
    return result + [[] for _ in range(num_bins - len(result))]


def _distribute(
    bins: Sequence[list[int]], costs: Sequence[float], num_ranks: int
) -> list[list[list[int]]]:
    """The dearest bin first, each to the cheapest rank that lacks one; equally many for each."""
    per_rank = len(bins) // num_ranks
    loads = [0.0] * num_ranks
    result: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for index in sorted(range(len(bins)), key=lambda i: (-costs[i], bins[i])):
        open_ranks = (r for r in range(num_ranks) if len(result[r]) < per_rank)
        rank = min(open_ranks, key=lambda r: (loads[r], r))
        result[rank].append(bins[index])
        loads[rank] += costs[index]
    return result


def num_trained_tokens(samples: Sequence[TrainSample]) -> int:
    """Sampled tokens of all trajectories, workers included."""
    return sum(sum(sample.loss_mask) for sample in samples)
