"""Numbers of one step's rollout, reduced in the manager. Names are those of `obs.metrics`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from megatron_matpo.agents.grammar import CallOutcome
from megatron_matpo.agents.tools import ToolBox, ToolReply, ToolSpec
from megatron_matpo.errors import ToolError
from megatron_matpo.rollout.refill import Collected
from megatron_matpo.types import Episode, Group, Role, Status, Trajectory


@runtime_checkable
class Counting(Protocol):
    """A tool box that counts what happens inside it, as a run's does (`mcp_tools.toolbox`)."""

    def counters(self) -> Mapping[str, float]:
        """Running totals by metric name."""
        ...


class MeteredToolBox:
    """A tool box that counts the calls of one step."""

    def __init__(self, inner: ToolBox) -> None:
        """Wrap `inner`, which other steps may use at the same time."""
        self._inner = inner
        self._counting = inner if isinstance(inner, Counting) else None
        self.restart()

    def restart(self) -> None:
        """Begin to count anew; a call in progress counts its answer from now on."""
        self.num_calls = self.num_answered = 0
        self.num_errors = 0
        """Replies that the tool marked as errors; the model read them."""
        self.num_failures = 0
        """Calls that the infrastructure failed."""
        self.latency_s = 0.0
        """Sum over answered calls."""
        self._before = self._counting.counters() if self._counting else {}

    def specs(self) -> list[ToolSpec]:
        """As `ToolBox.specs`."""
        return self._inner.specs()

    async def call(self, server: str, tool: str, arguments: dict[str, Any]) -> ToolReply:
        """As `ToolBox.call`."""
        self.num_calls += 1
        start = time.monotonic()
        try:
            reply = await self._inner.call(server, tool, arguments)
        except ToolError:
            self.num_failures += 1
            raise
        self.latency_s += time.monotonic() - start
        self.num_answered += 1
        self.num_errors += reply.is_error
        return reply

    def metrics(self) -> dict[str, float]:
        """`tools/*` of the step; steps that overlap share the numbers of what `inner` counts."""
        mean_s = self.latency_s / self.num_answered if self.num_answered else 0.0
        after = self._counting.counters() if self._counting else {}
        inside = {name: value - self._before[name] for name, value in after.items()}
        return inside | {
            "tools/calls": self.num_calls,
            "tools/errors": self.num_errors,
            "tools/failures": self.num_failures,
            "tools/latency_s_mean": mean_s,
        }


def rollout_metrics(groups: Sequence[Group], duration_s: float) -> dict[str, float]:
    """Metrics of a step's episodes.

    Rates and counts of tokens cover all episodes that are handed over, failed ones included; means
    over turns, workers and statuses cover the episodes that were graded.

    Args:
        groups: all groups of the step.
        duration_s: wall clock of the collection.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    graded = [episode for episode in episodes if episode.reward is not None]
    trajectories = [item for episode in episodes for item in episode.trajectories]
    num_sampled = sum(item.num_sampled_tokens for item in trajectories)
    num_failed = len(episodes) - len(graded)
    values = {
        "rollout/episodes": len(episodes),
        "rollout/failed": num_failed,
        "rollout/failed_frac": num_failed / len(episodes) if episodes else 0.0,
        "rollout/retries": sum(episode.num_retries for episode in episodes),
        "rollout/workers_per_planner": _mean(len(episode.workers) for episode in graded),
        "rollout/answer_found": _mean(bool(episode.answer) for episode in graded),
        "rollout/episode_s_mean": _mean(episode.duration_s for episode in graded),
        "rollout/episode_s_max": max((episode.duration_s for episode in graded), default=0.0),
        "tokens/sampled": num_sampled,
        "tokens/sampled_per_s": num_sampled / duration_s if duration_s > 0 else 0.0,
        "tokens/context": sum(item.num_tokens for item in trajectories),
        "time/collect_s": duration_s,
    }
    kinds = Counter(episode.failure.partition(":")[0] for episode in episodes if episode.failure)
    values |= {f"rollout/failed_by/{kind}": count for kind, count in kinds.items()}
    for role in Role:
        items = [item for episode in graded for item in _of_role(episode, role)]
        if items or role is Role.PLANNER:
            values |= _role_metrics(role, items)
    return {name: float(value) for name, value in values.items()}


def refill_metrics(collected: Collected) -> dict[str, float]:
    """What dynamic sampling did in a step; the discarded groups are in no other metric."""
    return discard_metrics(collected.discarded) | {
        "rollout/rounds": float(collected.num_rounds),
        "time/refill_s": collected.refill_s,
    }


def discard_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Of uninformative groups that others replaced."""
    episodes = [episode for group in groups for episode in group.episodes]
    trajectories = [item for episode in episodes for item in episode.trajectories]
    return {
        "rollout/discarded_groups": float(len(groups)),
        "tokens/discarded": float(sum(item.num_sampled_tokens for item in trajectories)),
    }


def _role_metrics(role: Role, items: Sequence[Trajectory]) -> dict[str, float]:
    outcomes = Counter(call.outcome for item in items for call in item.calls)
    num_calls = outcomes.total()
    values: dict[str, float] = {
        f"rollout/turns/{role}": _mean(item.num_model_turns for item in items),
        f"rollout/tokens/{role}": _mean(item.num_tokens for item in items),
        f"rollout/format/{role}": _mean(item.format_score for item in items),
        f"rollout/calls/{role}": num_calls / len(items) if items else 0.0,
    }
    for outcome in CallOutcome:
        if outcomes[outcome]:
            values[f"rollout/call_outcome/{role}/{outcome}"] = outcomes[outcome] / num_calls
    counts = Counter(item.status for item in items)
    for status in Status:
        if counts[status]:
            values[f"rollout/status/{role}/{status}"] = counts[status] / len(items)
    return values


def _of_role(episode: Episode, role: Role) -> Iterable[Trajectory]:
    return (episode.planner,) if role is Role.PLANNER else episode.workers


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return sum(items) / len(items) if items else 0.0
