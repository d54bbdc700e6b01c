"""One group that is begun and not handed over, and what a step takes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_matpo.agents.sampling import Sampled, Sampler
from megatron_matpo.rollout.scheduler import GroupJob
from megatron_matpo.rollout.staleness import oldest_version
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


@dataclass(slots=True, eq=False)
class OpenGroup:
    """A group that is begun and not handed over."""

    serial: int
    """In the order of beginning."""
    job: GroupJob
    finished: dict[int, Episode]
    """By sample index."""
    begun_at: PolicyVersion | None = None
    """Version that its first episode began with, or has tokens of; None: none has begun."""
    watched: dict[str, WatchedSampler] = field(default_factory=dict[str, WatchedSampler])
    """Of the running attempts, by episode id."""
    task: asyncio.Task[Group] | None = None
    completed: int = -1
    """In the order of completion; -1: not complete."""

    def watch(self, episode_id: str, policy: Sampler, version: PolicyVersion) -> WatchedSampler:
        """The sampler of a new attempt, which has no old tokens, begun with `version`."""
        if self.begun_at is None:
            self.begun_at = version
        watched = self.watched[episode_id] = WatchedSampler(policy)
        return watched

    def keep(self, episode: Episode) -> None:
        """An episode has ended."""
        self.finished[episode.sample_index] = episode
        self.watched.pop(episode.id, None)

    @property
    def oldest(self) -> PolicyVersion | None:
        """Version of the oldest token that is known and would be trained."""
        versions = [oldest_version(episode) for episode in self.finished.values()]
        versions += [item.oldest for item in self.watched.values()]
        return min((version for version in versions if version is not None), default=None)

    def so_far(self) -> Group:
        """With the episodes that have ended."""
        return self.job.group([self.finished[index] for index in sorted(self.finished)])


def since(group: Group, shift_s: float) -> Group:
    """With episodes that count their start from the step's own beginning; before it is negative."""
    episodes = tuple(replace(e, start_s=e.start_s + shift_s) for e in group.episodes)
    return replace(group, episodes=episodes)
