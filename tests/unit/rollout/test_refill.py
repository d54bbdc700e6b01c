"""Proves dynamic sampling: which groups make way, in which order, and where the step ends."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_matpo import wire
from megatron_matpo.config.root import Config
from megatron_matpo.data.dataset import prompts_from
from megatron_matpo.errors import EngineUnreachable, RolloutError
from megatron_matpo.obs import metrics as registry
from megatron_matpo.rollout import scheduler
from megatron_matpo.rollout.collect import RolloutManager
from megatron_matpo.rollout.refill import Collected, collect_groups
from megatron_matpo.types import Group, RolloutBatch
from tests.helpers.episodes import make_episode
from tests.helpers.rollouts import (
    FakeEngine,
    FakeToolBox,
    Script,
    make_chat,
    make_config,
    make_question,
)

ROWS = [make_question(f"Who is {i}?") for i in range(12)]


def group(index: int, rewards: Sequence[float | None]) -> Group:
    episodes = [
        make_episode(random.Random(index), f"q{index}", i, reward, 0)
        for i, reward in enumerate(rewards)
    ]
    return Group(f"q{index}", "test", f"{index}?", "x", index, tuple(episodes))


@pytest.mark.parametrize(
    ("rewards", "is_informative"),
    [
        ([0.1, 1.0], True),
        ([0.1, 0.1], False),
        ([1.0, None, 1.0], False),
        ([1.0, None, 0.1], True),
        ([1.0, None], False),
        ([None, None], False),
        ([], False),
    ],
)
def test_what_teaches(rewards: list[float | None], is_informative: bool) -> None:
    assert group(0, rewards).is_informative is is_informative


def play(teaching: set[int], num_groups: int, max_rounds: int) -> tuple[Collected, list[int]]:
    """Questions in `teaching` give informative groups; also returns what was asked, in order."""
    asked: list[int] = []

    async def run_round(first: int, count: int) -> list[Group]:
        asked.extend(range(first, first + count))
        return [
            group(index, [0.0, 1.0] if index in teaching else [0.0, 0.0])
            for index in range(first, first + count)
        ]

    return asyncio.run(collect_groups(run_round, num_groups, max_rounds)), asked


def indices(groups: Sequence[Group]) -> list[int]:
    return [item.row_index for item in groups]


@pytest.mark.parametrize(
    ("teaching", "max_rounds", "kept", "discarded", "num_rounds"),
    [
        ({0, 1, 2, 3}, 3, [0, 1, 2, 3], [], 1),
        ({0, 2, 4, 5}, 3, [0, 4, 2, 5], [1, 3], 2),
        ({0, 2, 5, 6}, 3, [0, 6, 2, 5], [1, 3, 4], 3),
        ({0}, 2, [0, 7, 8, 9], [1, 2, 3, 4, 5, 6], 3),  # 7, 8 and 9 teach nothing either
        ({0}, 0, [0, 1, 2, 3], [], 1),
        (set(), 1, [4, 5, 6, 7], [0, 1, 2, 3], 2),
    ],
)
def test_rounds(
    teaching: set[int], max_rounds: int, kept: list[int], discarded: list[int], num_rounds: int
) -> None:
    collected, asked = play(teaching, 4, max_rounds)
    assert indices(collected.groups) == kept
    assert indices(collected.discarded) == discarded
    assert collected.num_rounds == num_rounds
    assert asked == list(range(collected.num_questions))


def test_any_pattern_keeps_the_invariants() -> None:
    rng = random.Random(3)
    for _ in range(200):
        num_groups, max_rounds = rng.randint(1, 8), rng.randint(0, 4)
        teaching = {index for index in range(64) if rng.random() < rng.choice((0.1, 0.5, 0.9))}
        collected, asked = play(teaching, num_groups, max_rounds)
        assert len(collected.groups) == num_groups
        assert sorted(indices(collected.groups) + indices(collected.discarded)) == asked
        assert teaching.isdisjoint(indices(collected.discarded)), "what teaches is never lost"
        assert collected.num_rounds <= max_rounds + 1
        if not teaching.issuperset(indices(collected.groups)):
            assert collected.num_rounds == max_rounds + 1, "it gave up before the bound"


def config_of(**rollout: object) -> Config:
    return make_config(dynamic_sampling=True, dynamic_sampling_max_rounds=2, **rollout)


def mixed(rows: set[int]) -> Script:
    """Of the questions in `rows`, the second sample is wrong; of all others, none is."""

    def script(conversation: str, turn: int, text: str) -> str:
        is_second = conversation.split(".")[1] == "1"
        is_mixed = any(f"Who is {row}?" in text for row in rows)
        return "\\boxed{Bob}" if is_second and is_mixed else "\\boxed{Ada}"

    return script


def manager(config: Config, script: Script) -> RolloutManager:
    engine = FakeEngine(script)
    return RolloutManager(
        config, lambda version: engine, FakeToolBox(), make_chat(), {"train": ROWS, "eval": ROWS}
    )


def test_a_step_of_the_manager() -> None:
    order = prompts_from(len(ROWS), 20, 1, 5)
    script = mixed({order[1], order[3]})
    batch = asyncio.run(manager(config_of(), script).collect(3, 0, position=5))
    assert indices(batch.groups) == [order[3], order[1]]
    assert [item.uid for item in batch.groups] == ["train-3-3", "train-3-1"]
    assert batch.next_position == 5 + 2 + 1 + 1
    assert batch.metrics["rollout/rounds"] == 3
    assert batch.metrics["rollout/discarded_groups"] == 2
    registry.check(batch.metrics, partial=True)


def test_what_was_discarded_is_counted_in_tokens() -> None:
    order = prompts_from(len(ROWS), 4, 1, 0)
    batch = asyncio.run(manager(config_of(), mixed(set(order[2:]))).collect(1, 0))
    assert indices(batch.groups) == order[2:4]
    # One answer is one turn of the same length, whoever is named.
    assert batch.metrics["tokens/discarded"] == batch.metrics["tokens/sampled"] > 0


def test_without_dynamic_sampling_nothing_is_replaced() -> None:
    batch = asyncio.run(manager(make_config(), mixed(set())).collect(1, 0, position=4))
    assert indices(batch.groups) == prompts_from(len(ROWS), 2, 1, 4)
    assert batch.next_position == 6
    assert not {"rollout/rounds", "rollout/discarded_groups"} & batch.metrics.keys()


def test_an_evaluation_replaces_nothing() -> None:
    batch = asyncio.run(manager(config_of(), mixed(set())).collect(1, 0, "eval"))
    assert "rollout/rounds" not in batch.metrics


def steps(config: Config, first: int, last: int, position: int) -> list[RolloutBatch]:
    """Steps of one manager process, which knows nothing of what was before it."""
    source, batches = manager(config, mixed({0, 3, 5, 8, 11})), []
    for step in range(first, last + 1):
        batches.append(asyncio.run(source.collect(step, step - 1, position=position)))
        position = batches[-1].next_position
    return batches


def test_a_resumed_run_asks_what_an_uninterrupted_one_asks() -> None:
    whole = steps(config_of(), 1, 8, 0)
    before = steps(config_of(), 1, 4, 0)
    saved = json.loads(json.dumps(wire.decode(wire.encode(before[-1])).next_position))
    after = steps(config_of(), 5, 8, saved)
    assert [indices(batch.groups) for batch in whole] == [
        indices(batch.groups) for batch in before + after
    ]
    assert [batch.next_position for batch in whole] == [
        batch.next_position for batch in before + after
    ]
    assert any(batch.metrics["rollout/discarded_groups"] for batch in whole[:4]), "a real test"


def test_failures_of_all_rounds_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "RETRY_PAUSE_S", 0.0)

    def failing(*conversations: str) -> Script:
        def script(conversation: str, turn: int, text: str) -> str | BaseException:
            is_hit = any(conversation.startswith(f"{name}.") for name in conversations)
            return EngineUnreachable("gone") if is_hit else "\\boxed{Ada}"

        return script

    config = config_of(max_failed_frac=0.25, max_episode_retries=0)
    config = replace(config, rollout=replace(config.rollout, dynamic_sampling_max_rounds=1))
    # 2 of 4 would be too many in a round of its own; of the step's 8 they are not.
    batch = asyncio.run(manager(config, failing("train-1-2.0", "train-1-3.0")).collect(1, 0))
    assert batch.metrics["rollout/failed"] == 2
    with pytest.raises(RolloutError, match="3 of 8 episodes failed"):
        bad = failing("train-1-0.0", "train-1-2.0", "train-1-3.0")
        asyncio.run(manager(config, bad).collect(1, 0))
