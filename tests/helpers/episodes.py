"""Builders of episode trees for tests; every number is derived from the arguments."""

from __future__ import annotations

import random

from megatron_matpo.types import (
    CallRecord,
    Episode,
    Group,
    Reward,
    Role,
    RolloutBatch,
    Status,
    Trajectory,
    Turn,
    TurnKind,
    VersionSpan,
)


def make_trajectory(
    rng: random.Random, identity: str, *, role: Role = Role.PLANNER, parent: str = ""
) -> Trajectory:
    """A trajectory of one to four model turns with random tokens and float32-exact log-probs."""
    turns = [Turn(TurnKind.PROMPT, tuple(rng.choices(range(500), k=rng.randint(2, 9))), "prompt")]
    num_turns = rng.randint(1, 4)
    for i in range(num_turns):
        length = rng.randint(1, 7)
        turns.append(
            Turn(
                TurnKind.MODEL,
                tuple(rng.choices(range(500), k=length)),
                f"says {i} \u00e9\u4e2d",
                tuple(-rng.randint(1, 64) / 16 for _ in range(length)),
                (VersionSpan(3, length),),
                "stop",
            )
        )
        if i + 1 < num_turns:
            turns.append(Turn(TurnKind.ENVIRONMENT, tuple(rng.choices(range(500), k=5)), "reply"))
    return Trajectory(
        id=identity,
        role=role,
        agent="main_agent" if role is Role.PLANNER else "browsing_agent",
        parent_id=parent,
        spawn_turn=0 if role is Role.PLANNER else 1,
        turns=tuple(turns),
        status=Status.ANSWERED,
        format_score=1.0,
        calls=(CallRecord(1, "server", "tool", "ok", duration_s=0.5),),
        task="question",
        subtask="" if role is Role.PLANNER else "subtask",
    )


def make_episode(
    rng: random.Random, uid: str, index: int, reward: float | None, num_workers: int
) -> Episode:
    """An episode with `num_workers` workers; `reward` None means an infrastructure failure."""
    identity = f"{uid}.{index}"
    return Episode(
        id=identity,
        uid=uid,
        sample_index=index,
        planner=make_trajectory(rng, f"{identity}.p"),
        workers=tuple(
            make_trajectory(rng, f"{identity}.w{i}", role=Role.WORKER, parent=f"{identity}.p")
            for i in range(num_workers)
        ),
        reward=None if reward is None else Reward(reward, 1.0, reward),
        failure="" if reward is not None else "tool server died",
    )


def make_batch(seed: int, *, num_groups: int = 4, max_workers: int = 3) -> RolloutBatch:
    """A step with uneven groups, failures, and episodes without workers."""
    rng = random.Random(seed)
    groups = []
    for g in range(num_groups):
        uid = f"q{g}"
        episodes = [
            make_episode(
                rng,
                uid,
                i,
                None if rng.random() < 0.15 else rng.choice([0.0, 0.05, 0.1, 0.95, 1.0]),
                rng.randint(0, max_workers),
            )
            for i in range(rng.randint(1, 6))
        ]
        groups.append(Group(uid, "world", f"question {g}", "truth", g, tuple(episodes)))
    return RolloutBatch(7, 3, tuple(groups), {"rollout/episodes": 12.0}, next_position=28)
