"""Random trees of episodes, and a policy that is a table, for property tests of what is trained."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatron_matpo.config import Config
from megatron_matpo.megatron.actor import UpdateResult
from megatron_matpo.megatron.batch import MicroBatch
from megatron_matpo.megatron.parallel import ParallelState
from megatron_matpo.megatron.schedule import LossFn
from megatron_matpo.trainer.learner import LearnResult, PolicyLearner
from megatron_matpo.types import (
    Episode,
    Group,
    Reward,
    Role,
    RolloutBatch,
    Status,
    TrainSample,
    Trajectory,
    Turn,
    TurnKind,
    VersionSpan,
)

# Sixteenths: whether a reward equals its baseline does not depend on the order of a sum.
REWARDS = st.none() | st.integers(0, 16).map(lambda n: n / 16)
# Lengths of turns after the prompt: positive is sampled, negative is the environment's. A
# trajectory may begin with either, and may hold no sampled token at all.
TURNS = st.lists(st.sampled_from([-3, -2, -1, 1, 2, 3, 4]), min_size=1, max_size=5)


def log_prob(rng: random.Random) -> float:
    """Exact in float32, and no ratio of two of them is a clipping bound."""
    return -rng.randint(1, 40) / 16


@st.composite
def trajectories(draw: st.DrawFn, identity: str, parent: str = "") -> Trajectory:
    """A prompt, then any sequence of sampled and environment turns."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    turns = [Turn(TurnKind.PROMPT, [rng.randint(0, 99) for _ in range(rng.randint(1, 4))], "")]
    for length in draw(TURNS):
        ids = [rng.randint(0, 99) for _ in range(abs(length))]
        if length < 0:
            turns.append(Turn(TurnKind.ENVIRONMENT, ids, ""))
        else:
            logprobs = [log_prob(rng) for _ in ids]
            spans = (VersionSpan(0, length),)
            turns.append(Turn(TurnKind.MODEL, ids, "", logprobs, spans, "stop"))
    return Trajectory(
        id=identity,
        role=Role.WORKER if parent else Role.PLANNER,
        agent="agent",
        parent_id=parent,
        spawn_turn=1 if parent else 0,
        turns=tuple(turns),
        status=Status.ANSWERED,
        format_score=1.0,
    )


@st.composite
def batches(draw: st.DrawFn) -> RolloutBatch:
    """Uneven groups, any number of workers, failures (no reward) anywhere."""
    groups: list[Group] = []
    for g in range(draw(st.integers(1, 4))):
        episodes: list[Episode] = []
        for e in range(draw(st.integers(1, 4))):
            identity = f"{g}.{e}"
            reward = draw(REWARDS)
            planner = draw(trajectories(f"{identity}.p"))
            workers = [
                draw(trajectories(f"{identity}.w{w}", planner.id))
                for w in range(draw(st.integers(0, 3)))
            ]
            part = None if reward is None else Reward(reward, 1.0, reward)
            episodes.append(Episode(identity, f"{g}", e, planner, tuple(workers), part))
        groups.append(Group(f"{g}", "world", "question", "truth", g, tuple(episodes)))
    return RolloutBatch(1, 0, tuple(groups))


@dataclass(frozen=True)
class Tables:
    """Log-probs of every trajectory by id, [T - 1] float64: of three policies that differ."""

    new: dict[str, Tensor]
    """Leaves: one free parameter for each token."""
    old: dict[str, Tensor]
    initial: dict[str, Tensor]

    @staticmethod
    def of(batch: RolloutBatch, seed: int) -> Tables:
        """Draw all of them."""
        rng = random.Random(seed)
        tables: list[dict[str, Tensor]] = []
        for _ in range(3):
            tables.append(
                {
                    item.id: torch.tensor(
                        [log_prob(rng) for _ in range(item.num_tokens - 1)], dtype=torch.float64
                    )
                    for group in batch.groups
                    for episode in group.episodes
                    for item in episode.trajectories
                }
            )
        for table in tables[0].values():
            table.requires_grad_(True)
        return Tables(*tables)


class TabularActor:
    """Has the interface of `MegatronActor`; log-probs come from `Tables` and no update moves them.

    Entropies are -log-prob / 2, for want of a distribution.
    """

    def __init__(self, tables: Tables) -> None:
        """Nothing seen yet."""
        self._tables = tables
        self.passes: list[str] = []
        """Scoring passes that were asked for."""
        self.losses: list[float] = []
        """One for each update."""
        self.seen: list[list[str]] = []
        """Trajectories of each update."""
        self.indices: list[int] = []
        """Place of each update in the schedule of the learning rate."""

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
        """Of the old policy."""
        self.passes.append("old")
        return [(self._rows(self._tables.old, b), b.loss_mask) for b in micro_batches]

    def score_reference(self, micro_batches: Sequence[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
        """Of the initial policy."""
        self.passes.append("initial")
        return [(self._rows(self._tables.initial, b), b.loss_mask) for b in micro_batches]

    def update(
        self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn, update_index: int
    ) -> UpdateResult:
        """Gradients accumulate in the table of the new policy."""
        total, reduced = 0.0, {}
        for batch in micro_batches:
            logprobs = self._rows(self._tables.new, batch)
            loss, metrics = loss_fn(logprobs, -logprobs.detach() / 2, batch)
            if loss.requires_grad:
                loss.backward()
            total += float(loss.detach())
            for name, value in metrics.items():
                both = (reduced.get(name, 0.0), float(value.detach()))
                reduced[name] = max(both) if name.endswith("/max") else sum(both)
        self.losses.append(total)
        self.seen.append([identity for batch in micro_batches for identity in batch.sample_ids])
        self.indices.append(update_index)
        return UpdateResult(total, 0.0, 0.0, reduced)

    def _rows(self, table: Mapping[str, Tensor], batch: MicroBatch) -> Tensor:
        """[t] float64, 0 where the loss mask is 0, as the real actor returns them."""
        rows = [table[identity] for identity in batch.sample_ids]
        assert tuple(map(len, rows)) == batch.lengths or not rows
        return (torch.cat(rows) if rows else torch.zeros(1).double()) * batch.loss_mask


def learn(
    config: Config, samples: Sequence[TrainSample], tables: Tables, dp_size: int
) -> tuple[TabularActor, LearnResult]:
    """One step of the real learner, the micro-batches of all data-parallel ranks on one actor."""
    actor = TabularActor(tables)
    ranks = []
    for rank in range(dp_size):
        state = ParallelState(rank, dp_size, 0, 1, 0, 1, rank, dp_size, 0, 1, torch.device("cpu"))
        learner = PolicyLearner(config, actor, state, Path())  # type: ignore[arg-type]
        ranks.append(learner.prepare(samples))
    assert all(
        replace(other, batches=[]) == replace(mine, batches=[]) and other.batches
        for updates in ranks
        for other, mine in zip(updates, ranks[0], strict=True)
    ), "ranks disagree, or one has nothing to do"
    merged = [
        replace(parts[0], batches=[batch for part in parts for batch in part.batches])
        for parts in zip(*ranks, strict=True)
    ]
    return actor, learner.learn(merged, 5, 3)
