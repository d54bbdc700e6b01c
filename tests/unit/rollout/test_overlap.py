"""Proves, in virtual time, that a step takes as long as its longest episode and no longer.

The schedule is the benchmark's (`benchmarks/rollout_manager.py`); engine and tools take exactly the
drawn time on a clock that jumps from event to event. So workers of one turn overlap, and episodes
wait for nothing but their own inputs and, where it is bounded, for a place. What the manager itself
costs is not seen here: the benchmark measures that.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest

from benchmarks import rollout_schedule as schedule
from benchmarks.scripted_engine import TEMPLATE, ScriptedEngine
from benchmarks.sleeping_tools import TOOLS
from megatron_matpo.agents.tools import ToolReply, ToolSpec
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.data import DataConfig
from megatron_matpo.data.chat import Chat
from megatron_matpo.data.dataset import Question
from megatron_matpo.rollout.collect import RolloutManager
from megatron_matpo.types import RolloutBatch, VersionSpan
from tests.helpers.rollouts import FakeGeneration, make_config, make_tokenizer
from tests.helpers.virtual_time import VirtualTimeLoop

NUM_EPISODES = 24
SHAPE = schedule.Shape(seed=7, invalid_frac=0.2, reply_chars=(20, 60), turn_tokens=(4, 20))


class VirtualEngine:
    """Speaks `Sampler`; plays the schedule in virtual time."""

    def __init__(self, played: ScriptedEngine) -> None:
        self._played = played
        self.ended_s: dict[int, float] = {}
        """Episode -> when its planner's last turn came."""

    async def sample(
        self, ids: Sequence[int], max_tokens: int, conversation_id: str
    ) -> FakeGeneration:
        episode, worker, number = self._played.find_turn(ids)
        turns = self._played.agent(episode, worker).turns
        await asyncio.sleep(turns[number].latency_s)
        if worker is None and number + 1 == len(turns):
            self.ended_s[episode] = asyncio.get_running_loop().time()
        out = orjson.loads(self._played.answer(episode, worker, number))["output_ids"]
        return FakeGeneration(tuple(out), (-1.0,) * len(out), "stop", (VersionSpan(0, len(out)),))


class VirtualTools:
    """Speaks `ToolBox`; takes as long as it is told to, in virtual time."""

    def specs(self) -> list[ToolSpec]:
        (tool,) = TOOLS
        return [ToolSpec(schedule.SERVER, tool["name"], tool["description"], tool["inputSchema"])]

    async def call(self, server: str, tool: str, arguments: dict[str, Any]) -> ToolReply:
        await asyncio.sleep(arguments["wait_s"])
        return ToolReply("x" * int(arguments["num_chars"]), False)


def collect(max_concurrent: int) -> tuple[RolloutBatch, VirtualEngine, float]:
    """The step, its engine, and when it ended."""
    base = make_config(planner=schedule.PLANNER, context_length=40960)
    tools = [schedule.SERVER]
    config = replace(
        base,
        data=DataConfig(prompts_per_step=NUM_EPISODES, samples_per_prompt=1),
        rollout=replace(
            base.rollout, max_concurrent_episodes=max_concurrent, episode_timeout_s=1e6
        ),
        agents={
            schedule.PLANNER: AgentConfig(
                role="planner", tools=[schedule.WORKER], max_invalid_calls=100
            ),
            schedule.WORKER: AgentConfig(role="worker", tools=tools, max_invalid_calls=100),
        },
    )
    tokenizer = make_tokenizer(TEMPLATE)
    engine = VirtualEngine(ScriptedEngine(tokenizer, SHAPE))
    texts = [schedule.question(index) for index in range(NUM_EPISODES)]
    rows = [Question("", text, text, schedule.ANSWER, "test") for text in texts]
    manager = RolloutManager(
        config, lambda _: engine, VirtualTools(), Chat(tokenizer), {"train": rows}
    )
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        batch = runner.run(manager.collect(1, 0))
        return batch, engine, runner.get_loop().time()


def paths_s() -> list[float]:
    """Critical path of every episode, from the drawn latencies alone."""
    episodes = (schedule.make_episode(index, SHAPE) for index in range(NUM_EPISODES))
    return [schedule.critical_path_s(episode) for episode in episodes]


def test_every_episode_takes_exactly_its_critical_path() -> None:
    batch, engine, end_s = collect(max_concurrent=NUM_EPISODES)
    paths = paths_s()
    assert end_s == pytest.approx(max(paths), abs=1e-6)
    for index, path in enumerate(paths):
        assert engine.ended_s[index] == pytest.approx(path, abs=1e-6)
    episodes = [episode for group in batch.groups for episode in group.episodes]
    assert all(episode.reward and episode.reward.accuracy == 1.0 for episode in episodes)
    # The schedule has what the claim is about: workers side by side, and invalid calls.
    assert max(len(episode.workers) for episode in episodes) >= 4
    outcomes = {call.outcome for e in episodes for item in e.trajectories for call in item.calls}
    assert len(outcomes) > 1


def test_with_fewer_places_an_episode_starts_the_moment_one_is_free() -> None:
    places = 5
    _, engine, end_s = collect(max_concurrent=places)
    paths = paths_s()
    # Rows are asked in a seeded order, so who starts when is read off the ends.
    starts = {index: engine.ended_s[index] - path for index, path in enumerate(paths)}
    order = sorted(range(NUM_EPISODES), key=starts.__getitem__)
    free = [0.0] * places
    for index in order:
        start_s = heapq.heappop(free)
        assert starts[index] == pytest.approx(start_s, abs=1e-6)
        heapq.heappush(free, start_s + paths[index])
    assert end_s == pytest.approx(max(free), abs=1e-6)
