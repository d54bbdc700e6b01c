"""Which sample goes into which update, rank and micro-batch, and what it weighs. No torch.

Strategy: split by planner episode into updates, pack first, distribute second. Invariants (asserted
by the tests):

* every sample appears exactly once;
* all samples of an episode are in the same update, and updates differ by at most one episode;
* every data-parallel rank gets the same number of micro-batches per update;
* a micro-batch's padded size (samples x longest) is at most the token budget, unless it holds a
  single sample;
* the result depends only on the arguments (same on every rank, no communication).

`compat: reference` splits by trajectories instead (`split_by_trajectories`): then the second
invariant does not hold.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from megatron_matpo.types import Role, TrainSample

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
    """Sampled tokens of all trajectories, workers included."""
    return sum(sum(sample.loss_mask) for sample in samples)
