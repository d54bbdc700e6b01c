"""What every agent of the rollout benchmark does, and how long it takes: drawn from one seed.

Planners delegate to several workers per turn, workers call tools, some calls are invalid, and all
latencies have a long tail. Engine, tool servers and manager are separate processes; each makes the
same schedule from the same seed, so that no process has to tell another one what comes next.

The critical path needs this file alone: the longest episode if engines and tools took exactly the
drawn time, everything else took none, and nothing waited for anything but its own inputs.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cached_property

PLANNER, WORKER, SERVER, TOOL = "planner", "browser", "web", "search"
ANSWER = "Ada"

_EPISODE = re.compile(r"Question (\d+):")
_SUBTASK = re.compile(r"Subtask (\d+) of question (\d+):")


@dataclass(frozen=True)
class ToolCall:
    """An ordinary tool call; the tool server is told to take `latency_s` and write `num_chars`."""

    latency_s: float
    num_chars: int


@dataclass(frozen=True)
class InvalidCall:
    """A call of a tool that does not exist: answered by the manager itself, at once."""


@dataclass(frozen=True)
class Delegation:
    """A worker; `number` counts the workers of the episode in call order."""

    number: int
    agent: Agent


Call = ToolCall | InvalidCall | Delegation


@dataclass(frozen=True)
class Turn:
    """One generation, and the calls that it ends with (they run at the same time)."""

    latency_s: float
    num_tokens: int
    """Tokens of prose, before the calls."""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Agent:
    """The turns of one context. A worker's last one is its final summary, which has no calls."""

    turns: tuple[Turn, ...]

    @cached_property
    def messages_seen(self) -> tuple[int, ...]:
        """Number of messages, the opened assistant message included, in the context of turn t."""
        counts, seen = [], 3  # system, user, assistant
        for turn in self.turns:
            counts.append(seen)
            seen += max(1, len(turn.calls)) + 1  # replies, or the request of the summary
        return tuple(counts)


def workers_of(agent: Agent) -> list[Agent]:
    """Workers of a planner in call order."""
    return [
        call.agent for turn in agent.turns for call in turn.calls if isinstance(call, Delegation)
    ]


def num_tool_calls(agent: Agent) -> int:
    """Ordinary calls of an agent and of its workers."""
    calls = [call for turn in agent.turns for call in turn.calls]
    own = sum(isinstance(call, ToolCall) for call in calls)
    return own + sum(num_tool_calls(worker) for worker in workers_of(agent))


def num_generations(agent: Agent) -> int:
    """Generations of an agent and of its workers."""
    return len(agent.turns) + sum(num_generations(worker) for worker in workers_of(agent))


def critical_path_s(agent: Agent) -> float:
    """Its turns, one after another, each with the slowest of its calls."""

    def cost(call: Call) -> float:
        match call:
            case ToolCall():
                return call.latency_s
            case Delegation():
                return critical_path_s(call.agent)
            case InvalidCall():
                return 0.0

    return sum(
        turn.latency_s + max((cost(call) for call in turn.calls), default=0.0)
        for turn in agent.turns
    )


@dataclass(frozen=True)
class Shape:
    """Sizes and latencies of a schedule."""

    seed: int = 0
    time_scale: float = 1.0
    """Factor on all latencies."""
    planner_turns: tuple[int, int] = (1, 2)
    """Delegating turns, from and to; the answer is one more."""
    workers_per_turn: tuple[int, int] = (1, 3)
    worker_turns: tuple[int, int] = (1, 4)
    """Turns with tool calls; report and final summary are two more."""
    invalid_frac: float = 0.03
    """Share of turns that add an invalid call."""
    tail_frac: float = 0.02
    """Share of latencies that are `tail_factor` times as long."""
    tail_factor: float = 4.0
    generation_s: float = 3.0
    """Median of a generation."""
    tool_s: float = 1.8
    """Median of a tool call."""
    reply_chars: tuple[int, int] = (2000, 5000)
    turn_tokens: tuple[int, int] = (60, 240)


def make_episode(index: int, shape: Shape) -> Agent:
    """The planner of episode `index`; a function of its arguments alone."""
    rng = random.Random(f"{shape.seed}/{index}")
    num_workers = 0

    def latency(median_s: float) -> float:
        value = rng.lognormvariate(0.0, 0.4) * median_s * shape.time_scale
        return value * (shape.tail_factor if rng.random() < shape.tail_frac else 1.0)

    def turn(calls: list[Call]) -> Turn:
        if calls and rng.random() < shape.invalid_frac:
            calls.insert(rng.randrange(len(calls) + 1), InvalidCall())
        return Turn(latency(shape.generation_s), rng.randint(*shape.turn_tokens), tuple(calls))

    def worker() -> Agent:
        turns = []
        for _ in range(rng.randint(*shape.worker_turns)):
            num_calls = 2 if rng.random() < 0.25 else 1
            calls = [
                ToolCall(latency(shape.tool_s), rng.randint(*shape.reply_chars))
                for _ in range(num_calls)
            ]
            turns.append(turn([*calls]))
        return Agent((*turns, turn([]), turn([])))

    def delegation() -> Delegation:
        nonlocal num_workers
        num_workers += 1
        return Delegation(num_workers - 1, worker())

    turns = [
        turn([delegation() for _ in range(rng.randint(*shape.workers_per_turn))])
        for _ in range(rng.randint(*shape.planner_turns))
    ]
    return Agent((*turns, turn([])))


def question(index: int) -> str:
    """The user message by which `who` recognises the episode."""
    return f"Question {index}: who wrote it? Box the answer."


def subtask(index: int, number: int) -> str:
    """The subtask by which `who` recognises the worker."""
    return f"Subtask {number} of question {index}: find out who it was."


def who(user_message: str) -> tuple[int, int | None]:
    """(episode, worker or None for the planner) of a context with this user message.

    Raises:
        ValueError: it is none of the benchmark's.
    """
    if found := _SUBTASK.search(user_message):
        return int(found[2]), int(found[1])
    if found := _EPISODE.search(user_message):
        return int(found[1]), None
    raise ValueError(f"not a context of this benchmark: {user_message[:200]!r}")
