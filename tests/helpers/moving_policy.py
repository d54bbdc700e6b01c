"""An engine in virtual time whose weights change while it samples, and a trainer beside it."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from megatron_matpo.config.data import DataConfig
from megatron_matpo.config.root import Config
from megatron_matpo.data.tokenizer import Tokenizer
from megatron_matpo.rollout.collect import RolloutManager
from megatron_matpo.types import Episode, Group, RolloutBatch, VersionSpan
from tests.helpers.rollouts import (
    FakeGeneration,
    FakeToolBox,
    make_chat,
    make_config,
    make_question,
    make_tokenizer,
)

Seconds = Callable[[str], float]
"""Conversation id -> seconds of each of its turns."""


@dataclass
class MovingPolicy:
    """Speaks `Sampler`; a generation that a push meets has tokens of both versions."""

    seconds: Seconds
    answer: Callable[[str], str] = lambda conversation: "It is \\boxed{Ada}"
    tokenizer: Tokenizer = field(default_factory=make_tokenizer)
    pushed_s: list[float] = field(default_factory=lambda: [0.0])
    first_version: int = 0
    num_running: int = 0
    expected: int = 0
    asked: list[str] = field(default_factory=list)

    def push(self) -> None:
        """The next version from now on."""
        self.pushed_s.append(asyncio.get_running_loop().time())

    def expect(self, version: int) -> None:
        self.expected = version

    def follower(self) -> MovingPolicy:
        return self

    def sampler(self, version: int) -> MovingPolicy:
        self.expect(version)
        return self

    @property
    def version(self) -> int:
        return self.first_version + len(self.pushed_s) - 1

    async def sample(
        self, ids: Sequence[int], max_tokens: int, conversation_id: str
    ) -> FakeGeneration:
        out = self.tokenizer.encode(self.answer(conversation_id) + "<|im_end|>")
        self.asked.append(conversation_id)
        loop = asyncio.get_running_loop()
        start, seconds = loop.time(), self.seconds(conversation_id)
        self.num_running += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self.num_running -= 1
        versions = [
            self.first_version - 1 + bisect_right(self.pushed_s, start + (i + 0.5) * seconds / n)
            for i, n in enumerate([len(out)] * len(out))
        ]
        assert max(versions, default=0) <= self.expected, "nobody said that this version may come"
        spans = tuple(VersionSpan(v, len(list(group))) for v, group in groupby(versions))
        return FakeGeneration(tuple(out), (-0.5,) * len(out), "stop", spans)


def single_agent(num_prompts: int = 3, num_samples: int = 2, **rollout: Any) -> Config:
    """Planners without workers, `num_prompts` groups a step."""
    config = make_config(**rollout)
    planner = replace(config.agents["planner"], tools=["web"])
    return replace(
        config,
        data=DataConfig(prompts_per_step=num_prompts, samples_per_prompt=num_samples),
        agents={"planner": planner},
    )


def manager_of(config: Config, policy: MovingPolicy, num_rows: int = 11) -> RolloutManager:
    """A manager with rows `Who is 0?` and so on."""
    questions = {"train": [make_question(f"Who is {i}?") for i in range(num_rows)]}
    return RolloutManager(
        config,
        policy.sampler,
        FakeToolBox(),
        make_chat(),
        questions,
        moving=policy,
    )


async def train(
    manager: RolloutManager,
    policy: MovingPolicy,
    num_steps: int,
    train_s: float = 1.0,
    first_step: int = 1,
    position: int = 0,
) -> list[RolloutBatch]:
    """Collect, train and push, step after step."""
    batches: list[RolloutBatch] = []
    for step in range(first_step, first_step + num_steps):
        batch = await manager.collect(step, policy.version, position=position)
        batches.append(batch)
        position = batch.next_position
        await asyncio.sleep(train_s)
        policy.push()
    return batches


def timeless(groups: Sequence[Group]) -> list[Group]:
    """Without what a clock says."""

    def still(episode: Episode) -> Episode:
        planner, *workers = (
            replace(item, calls=tuple(replace(call, duration_s=0.0) for call in item.calls))
            for item in episode.trajectories
        )
        times = {"start_s": 0.0, "duration_s": 0.0, "score_s": 0.0}
        return replace(episode, planner=planner, workers=tuple(workers), **times)

    return [replace(g, episodes=tuple(map(still, g.episodes))) for g in groups]


def versions_of(batch: RolloutBatch) -> set[int]:
    """Of all sampled tokens."""
    return {
        span.version
        for group in batch.groups
        for episode in group.episodes
        for item in episode.trajectories
        for turn in item.turns
        for span in turn.versions
    }
