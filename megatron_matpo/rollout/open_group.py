"""One group that is begun and not handed over, and what a step takes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_matpo.agents.sampling import Sampled, Sampler
from megatron_matpo.rollout.scheduler import GroupJob
from megatron_matpo.types import Episode, Group, PolicyVersion


@dataclass(frozen=True, slots=True)
class Taken:
    """What a step got."""

    step: int
    groups: list[Group]
    metrics: dict[str, float]
    """Of what is special about groups that outlive steps; empty with a bound of 0."""
    seconds: float
    """Since the step before was handed over; the first: since it was asked for."""
    next_position: int
    """Questions begun so far."""
    discarded: list[Group]
    """Uninformative ones (`rollout.dynamic_sampling`)."""


@dataclass(slots=True, eq=False)
class OpenGroup:
    """A group that is begun and not handed over."""

    serial: int
    """In the order of beginning."""
    job: GroupJob
    begun_at: PolicyVersion
    finished: dict[int, Episode]
    """By sample index."""
    task: asyncio.Task[Group] | None = None
    completed: int = -1
    """In the order of completion; -1: not complete."""

    def so_far(self) -> Group:
        """With the episodes that have ended."""
        return self.job.group([self.finished[index] for index in sorted(self.finished)])


class WatchedSampler:
    """A sampler that remembers the oldest version among the tokens of an attempt."""

    def __init__(self, inner: Sampler) -> None:
        """Wrap `inner`; nothing is sampled yet."""
        self._inner = inner
        self.oldest: PolicyVersion | None = None
        """None before the first token."""

    async def sample(self, ids: Sequence[int], max_tokens: int, conversation_id: str) -> Sampled:
        """As `Sampler.sample`."""
        sampled = await self._inner.sample(ids, max_tokens, conversation_id)
        known = [] if self.oldest is None else [self.oldest]
        self.oldest = min([*known, *(span.version for span in sampled.versions)], default=None)
        return sampled


def since(group: Group, shift_s: float) -> Group:
    """With episodes that count their start from the step's own beginning; before it is negative."""
    episodes = tuple(replace(e, start_s=e.start_s + shift_s) for e in group.episodes)
    return replace(group, episodes=episodes)
