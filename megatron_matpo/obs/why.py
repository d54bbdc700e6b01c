"""One line that says why a step was slow, from what was measured anyway. Pure functions.

A cause is a number of seconds that the step would not have taken without it, and a text of facts.
It is told if those seconds are a tenth of the step or more, and at least one; where nothing stands
out there is no line. Seconds of different causes may overlap, so they are not added up.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from megatron_matpo.obs.spans import RECEIVE, Span
from megatron_matpo.types import Episode, Group

MIN_S = 1.0
MIN_FRAC = 0.1
"""Of the step: what a cause must have cost to be told."""
MAX_TOLD = 3
TAIL_EPISODES_FRAC = 0.05
"""The tail is when no more than this share of the episodes (at least one) still runs ..."""
TAIL_FRAC = 0.25
"""... and stands out from this share of the collection on."""
TAIL_MOST = 0.8
"""Of the tail's time: what the episodes that are counted as the tail make up."""
MIN_EPISODES = 4
"""With fewer there is no tail: every episode is a large part of the step."""
SLOW_FACTOR = 1.5
"""A phase is slow from so many times its usual length on, an engine from that of the others."""
HISTORY = 10
"""Steps that tell what is usual ..."""
MIN_HISTORY = 3
"""... and how many are needed for it."""
TOOL_FRAC = 0.5
"""Share of the episodes' time from which on a tool stands out."""


PHASES = ("rollout", "score", "train", "sync")


class PhaseHistory:
    """How long the phases of the last steps took."""

    def __init__(self) -> None:
        """Empty."""
        self.phases: dict[str, deque[float]] = {name: deque(maxlen=HISTORY) for name in PHASES}

    def add(self, metrics: Mapping[str, float | None]) -> None:
        """Add a step; lines without a step's times (evaluations) say nothing."""
        for name, seconds in self.phases.items():
            if (value := metrics.get(f"time/{name}_s")) is not None:
                seconds.append(value)


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What is known of a finished step."""

    metrics: Mapping[str, float]
    """`time/*`, `rollout/*` and `judge/*` of the step."""
    groups: Sequence[Group] = ()
    spans: Sequence[Span] = ()
    """Of the trainer's first rank."""
    history: Mapping[str, Sequence[float]] | None = None
    """Phase -> its seconds in steps before, newest last."""
    max_concurrent: int = 0
    """`rollout.max_concurrent_episodes`."""

    def seconds(self, phase: str) -> float:
        """`time/PHASE_s`; 0 if there is none."""
        return self.metrics.get(f"time/{phase}_s", 0.0)


@dataclass(frozen=True, slots=True)
class Cause:
    """One thing that took time."""

    lost_s: float
    text: str


def explain(facts: StepFacts) -> str:
    """The line; empty if nothing stands out."""
    least_s = max(MIN_S, MIN_FRAC * facts.seconds("step"))
    told: list[tuple[str, Cause]] = []
    for phase in PHASES:
        known = [cause for cause in _causes(facts, phase) if cause.lost_s >= least_s]
        unusual = _unusual(facts, phase)
        if not known and unusual is not None and unusual.lost_s >= least_s:
            known = [unusual]
        told += [(phase, cause) for cause in known]
    told.sort(key=lambda item: -item[1].lost_s)
    parts: list[str] = []
    named: set[str] = set()
    for phase, cause in told[:MAX_TOLD]:
        head = "" if phase in named else f"{phase} {facts.seconds(phase):.0f} s: "
        parts.append(head + cause.text)
        named.add(phase)
    return "; ".join(parts)


def _causes(facts: StepFacts, phase: str) -> Iterator[Cause]:
    """What is known of a phase. Nothing costs more than the phase took.

    Replayed episodes took their time in another run, and asynchronous ones during training: what
    the step did not wait for did not make it slow.
    """
    found: Iterator[Cause] = iter(())
    if phase == "rollout":
        found = _rollout_causes(facts)
    elif phase == "sync":
        found = _slow_engine(facts.spans)
    for cause in found:
        yield Cause(min(cause.lost_s, facts.seconds(phase)), cause.text)


def _rollout_causes(facts: StepFacts) -> Iterator[Cause]:
    episodes = [
        (number, episode)
        for number, group in enumerate(facts.groups)
        for episode in group.episodes
        if episode.duration_s > 0
    ]
    if not episodes:
        return
    collect_s = facts.seconds("collect")
    found = (
        _tail(episodes, collect_s),
        _judge(facts, [episode for _, episode in episodes]),
        _slots(facts, [episode for _, episode in episodes]),
        _tools([episode for _, episode in episodes], collect_s),
        _refill(facts),
        _handover(facts),
    )
    yield from (cause for cause in found if cause is not None)


def _end_s(episode: Episode) -> float:
    return episode.start_s + episode.duration_s


def _tail(episodes: Sequence[tuple[int, Episode]], collect_s: float) -> Cause | None:
    """The last part of the collection, in which few episodes ran: the fewest that make it up."""
    if len(episodes) < MIN_EPISODES or collect_s <= 0:
        return None
    by_end = sorted(episodes, key=lambda item: -_end_s(item[1]))
    ends_s = [_end_s(episode) for _, episode in by_end]
    most = max(1, math.floor(TAIL_EPISODES_FRAC * len(episodes)))
    whole_s = ends_s[0] - ends_s[most]
    count = next(n for n in range(1, most + 1) if ends_s[0] - ends_s[n] >= TAIL_MOST * whole_s)
    tail_s = ends_s[0] - ends_s[count]
    if tail_s < TAIL_FRAC * collect_s:
        return None
    share = min(1.0, tail_s / collect_s)
    number, longest = max(by_end[:count], key=lambda item: item[1].duration_s)
    who = f"group {number} episode {longest.sample_index}, {_shown(longest)}"
    return Cause(
        tail_s,
        f"tail: {count} of {len(episodes)} episodes took {share:.0%} of it (longest: {who})",
    )


def _shown(episode: Episode) -> str:
    """What an episode did: turns, workers, retries, and the tool it waited for longest."""
    parts = [f"{sum(item.num_model_turns for item in episode.trajectories)} turns"]
    if episode.workers:
        parts.append(f"{len(episode.workers)} workers")
    if episode.num_retries:
        parts.append(f"{episode.num_retries} retries")
    if episode.failure:
        parts.append(f"left out: {episode.failure.partition(':')[0]}")
    seconds = _tool_seconds([episode])
    if seconds:
        tool = max(seconds, key=lambda name: seconds[name][0])
        if seconds[tool][0] >= MIN_S:
            parts.append(f"tool {tool} {seconds[tool][0]:.0f} s")
    return ", ".join(parts)


def _tool_seconds(episodes: Sequence[Episode]) -> dict[str, tuple[float, int]]:
    """Tool -> (seconds, calls); calls of one turn count apart, though they ran side by side."""
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for episode in episodes:
        for call in (call for item in episode.trajectories for call in item.calls):
            if not call.worker_id and call.duration_s > 0:
                seconds, count = found[call.tool]
                found[call.tool] = seconds + call.duration_s, count + 1
    return dict(found)


def _judge(facts: StepFacts, episodes: Sequence[Episode]) -> Cause | None:
    """Verdicts that came after the last episode had ended."""
    last_s = max(map(_end_s, episodes))
    scored_s = max(_end_s(episode) + episode.score_s for episode in episodes)
    calls = facts.metrics.get("judge/calls", 0.0)
    if not calls or scored_s <= last_s:
        return None
    failures = facts.metrics.get("judge/failures", 0.0)
    failed = f", {failures:.0f} verdicts did not come" if failures else ""
    mean_s = facts.metrics.get("judge/latency_s_mean", 0.0)
    wait_s = scored_s - last_s
    return Cause(
        wait_s,
        f"waited {wait_s:.0f} s for the judge ({calls:.0f} requests, mean {mean_s:.1f} s{failed})",
    )


def _slots(facts: StepFacts, episodes: Sequence[Episode]) -> Cause | None:
    """More episodes than places; with rounds, later ones start late for another reason."""
    num_late = max(0, len(episodes) - facts.max_concurrent) if facts.max_concurrent else 0
    if not num_late or facts.metrics.get("rollout/rounds", 1.0) > 1.0:
        return None
    longest_s = max(episode.start_s for episode in episodes)
    return Cause(
        longest_s,
        f"{num_late} of {len(episodes)} episodes waited for a slot, up to {longest_s:.0f} s "
        f"(rollout.max_concurrent_episodes={facts.max_concurrent})",
    )


def _tools(episodes: Sequence[Episode], collect_s: float) -> Cause | None:
    """One tool that took most of the episodes' time."""
    seconds = _tool_seconds(episodes)
    if not seconds:
        return None
    tool = max(seconds, key=lambda name: seconds[name][0])
    spent_s, count = seconds[tool]
    share = spent_s / sum(episode.duration_s for episode in episodes)
    if share < TOOL_FRAC:
        return None
    return Cause(
        min(share, 1.0) * collect_s,
        f"tool {tool} took {min(share, 1.0):.0%} of the episodes' time ({count} calls, mean "
        f"{spent_s / count:.1f} s)",
    )


def _refill(facts: StepFacts) -> Cause | None:
    seconds = facts.seconds("refill")
    if seconds <= 0:
        return None
    rounds = facts.metrics.get("rollout/rounds", 1.0) - 1
    groups = facts.metrics.get("rollout/discarded_groups", 0.0)
    return Cause(
        seconds,
        f"dynamic sampling replaced {groups:.0f} groups in {rounds:.0f} more rounds "
        f"({seconds:.0f} s)",
    )


def _handover(facts: StepFacts) -> Cause | None:
    """Between manager and trainer: the batch is encoded, sent and read."""
    collect_s, rollout_s = facts.seconds("collect"), facts.seconds("rollout")
    seconds = rollout_s - collect_s
    if seconds <= 0 or collect_s <= 0:
        return None
    return Cause(seconds, f"{seconds:.0f} s to hand the batch over, after {collect_s:.0f} s of it")


def _slow_engine(spans: Sequence[Span]) -> Iterator[Cause]:
    """An engine that took weights much more slowly than the others."""
    taken: dict[int, float] = defaultdict(float)
    for item in spans:
        if item.name == RECEIVE:
            taken[int(item.notes["engine"])] += item.end_s - item.start_s
    if len(taken) < 2:
        return
    slowest = max(taken, key=lambda index: taken[index])
    others_s = median(seconds for index, seconds in taken.items() if index != slowest)
    if taken[slowest] >= SLOW_FACTOR * others_s:
        yield Cause(
            taken[slowest] - others_s,
            f"engine-{slowest} slow ({taken[slowest]:.0f} s, the others {others_s:.0f} s)",
        )


def _unusual(facts: StepFacts, phase: str) -> Cause | None:
    """A phase that took longer than it did before, for a reason that nothing here knows."""
    before = (facts.history or {}).get(phase, ())
    if len(before) < MIN_HISTORY:
        return None
    seconds, usual_s = facts.seconds(phase), median(before)
    if seconds < SLOW_FACTOR * usual_s:
        return None
    return Cause(seconds - usual_s, f"usually {usual_s:.0f} s")
