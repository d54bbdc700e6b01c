"""What episodes do, without saying when: trees of turns, and bounds that hold for any machine.

Invariant: everything here is frozen and shared; a simulation keeps its state elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """One generation, and the calls that it ends with (they run at the same time)."""

    num_tokens: int
    """Sampled; at least 1."""
    tools_s: tuple[float, ...] = ()
    """Duration of each ordinary call, once it runs."""
    workers: tuple[Agent, ...] = ()
    """Delegations."""
    reply_tokens: int = 0
    """What the environment adds to the context before the next turn."""


@dataclass(frozen=True, slots=True)
class Agent:
    """One context."""

    prompt_tokens: int
    turns: tuple[Turn, ...]

    @property
    def num_sampled(self) -> int:
        """Tokens of its own turns."""
        return sum(turn.num_tokens for turn in self.turns)

    @property
    def num_tokens(self) -> int:
        """Length of the context at the end; the reply to the last turn is read by nobody."""
        replies = sum(turn.reply_tokens for turn in self.turns[:-1])
        return self.prompt_tokens + self.num_sampled + replies


def agents_of(planner: Agent) -> Iterator[Agent]:
    """The planner, then its workers."""
    yield planner
    for turn in planner.turns:
        for worker in turn.workers:
            yield from agents_of(worker)


def all_agents(episodes: Sequence[Agent]) -> list[Agent]:
    """Every context of a step."""
    return [agent for episode in episodes for agent in agents_of(episode)]


def critical_path_s(
    agent: Agent, generation_s: Callable[[int, int], float], pause_s: float = 0.0
) -> float:
    """Least duration of an episode: every turn after the other, each with the slowest of its calls.

    Args:
        agent: the planner.
        generation_s: (context tokens, sampled tokens) -> least seconds of a generation.
        pause_s: before every generation.
    """
    spent, context = 0.0, agent.prompt_tokens
    for turn in agent.turns:
        calls = [*turn.tools_s]
        calls += [critical_path_s(worker, generation_s, pause_s) for worker in turn.workers]
        spent += pause_s + generation_s(context, turn.num_tokens) + max(calls, default=0.0)
        context += turn.num_tokens + turn.reply_tokens
    return spent
