"""Episodes drawn from distributions: how many turns, how many tokens, how long tools take.

Everything here is an assumption of whoever wrote the file (`--lengths FILE.yaml`); recorded
episodes (`records.py`) are better wherever there are any. Counts of turns and workers are
geometric, sizes and latencies log-normal (median and sigma); the recipe's limits cut them.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from megatron_matpo.config import Config
from megatron_matpo.simulation.episodes import Agent, Turn

SUMMARY_TOKENS = 600
"""Median of a final summary, where a context ran full: an assumption."""


@dataclass(frozen=True)
class Spread:
    """A log-normal distribution; sigma 0 is a constant."""

    median: float = 0.0
    sigma: float = 0.0

    def draw(self, rng: random.Random) -> float:
        """One value."""
        return self.median * math.exp(self.sigma * rng.gauss(0.0, 1.0))

    @property
    def mean(self) -> float:
        """Expectation."""
        return self.median * math.exp(self.sigma**2 / 2)


@dataclass(frozen=True)
class AgentLengths:
    """Of one role."""

    prompt_tokens: Spread = field(default_factory=Spread)
    turn_tokens: Spread = field(default_factory=Spread)
    """Sampled in one turn, thoughts included."""
    reply_tokens: Spread = field(default_factory=Spread)
    """Of all calls of a turn together: tool results, or workers' reports."""
    mean_turns: float = 1.0
    """Turns with calls, on average; the answer is one more."""


@dataclass(frozen=True)
class Lengths:
    """A file of distributions."""

    source: str = ""
    """Where the numbers come from; printed."""
    planner: AgentLengths = field(default_factory=AgentLengths)
    worker: AgentLengths = field(default_factory=AgentLengths)
    workers_per_turn: int = 1
    """Delegations of a planner's turn, which run at the same time."""
    calls_per_turn: int = 1
    """Tool calls of a worker's turn (or of a single agent's)."""
    tool_s: Spread = field(default_factory=Spread)
    judge_s: Spread = field(default_factory=Spread)


@dataclass(frozen=True)
class Limits:
    """What the recipe allows an agent."""

    max_turns: int
    max_tokens: int
    """Of one turn."""
    context: int
    reserve: int
    """Kept free for the final summary."""


class Drawer:
    """Draws episodes of a recipe."""

    def __init__(self, lengths: Lengths, config: Config) -> None:
        """`config` says who has workers and where contexts end."""
        self._lengths = lengths
        self._planner = _limits(config, config.rollout.planner)
        worker = next((name for name in _tools(config) if name in config.agents), "")
        self._worker = _limits(config, worker) if worker else None

    def episode(self, rng: random.Random) -> Agent:
        """One episode; without worker agents the planner does a worker's work itself."""
        lengths = self._lengths
        if self._worker is None:
            return self._agent(rng, lengths.worker, self._planner, 0)
        return self._agent(rng, lengths.planner, self._planner, lengths.workers_per_turn)

    def _agent(
        self, rng: random.Random, lengths: AgentLengths, limits: Limits, num_workers: int
    ) -> Agent:
        room = limits.context - limits.reserve
        prompt = max(1, min(room // 2, round(lengths.prompt_tokens.draw(rng))))
        used, turns = prompt, []
        wanted = min(limits.max_turns - 1, _geometric(rng, lengths.mean_turns))
        for _ in range(wanted):
            sampled = max(1, min(limits.max_tokens, round(lengths.turn_tokens.draw(rng))))
            reply = max(1, round(lengths.reply_tokens.draw(rng)))
            if used + sampled + reply >= room:
                break
            used += sampled + reply
            turns.append(self._turn(rng, sampled, reply, num_workers))
        last = max(1, min(limits.max_tokens, round(lengths.turn_tokens.draw(rng))))
        if len(turns) < wanted:  # the context ran full
            last = max(1, round(Spread(SUMMARY_TOKENS, 0.5).draw(rng)))
        last = min(last, limits.context - used - 1)
        return Agent(prompt, (*turns, Turn(max(1, last))))

    def _turn(self, rng: random.Random, sampled: int, reply: int, num_workers: int) -> Turn:
        lengths = self._lengths
        if not num_workers:
            calls = tuple(lengths.tool_s.draw(rng) for _ in range(lengths.calls_per_turn))
            return Turn(sampled, calls, (), reply)
        assert self._worker is not None
        workers = tuple(
            self._agent(rng, lengths.worker, self._worker, 0) for _ in range(num_workers)
        )
        return Turn(sampled, (), workers, reply)


def _geometric(rng: random.Random, mean: float) -> int:
    """0, 1, 2, ... with this mean."""
    if mean <= 0:
        return 0
    return int(math.log(1 - rng.random()) / math.log(mean / (1 + mean)))


def _tools(config: Config) -> list[str]:
    planner = config.agents.get(config.rollout.planner)
    return planner.tools if planner else []


def _limits(config: Config, name: str) -> Limits:
    agent, rollout = config.agents[name], config.rollout
    has_summary = agent.final_summary != "never"
    return Limits(
        max_turns=agent.max_turns,
        max_tokens=agent.max_tokens_per_turn,
        context=agent.context_length or rollout.context_length,
        reserve=agent.summary_reserve_tokens if has_summary else 0,
    )
