"""The same step on the same devices, placed in three ways.

* disaggregated: engines and trainer have devices of their own, and take turns;
* asynchronous: the same devices, but engines sample up to `max_staleness` steps ahead of the policy
  that is trained. Step k may begin when version k - 1 - staleness has been pushed; the trainer
  takes whole steps, in order; engines stop during a push and keep their caches;
* colocated: all devices sample, then all train; in between they are handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_matpo.simulation.engine import Usage
from megatron_matpo.simulation.episodes import Agent, all_agents
from megatron_matpo.simulation.rollout import Fleet, Rollout, run_step
from megatron_matpo.simulation.training import Phases, Trainer

DISAGGREGATED, ASYNCHRONOUS, COLOCATED = "disaggregated", "asynchronous", "colocated"
_WARM_UP = 2
"""Steps of an asynchronous run before the ones that count."""

Draw = Callable[[int], tuple[Sequence[Agent], Sequence[float]]]
"""step -> its episodes and, with a judge, the seconds of their verdicts."""


@dataclass(frozen=True)
class Setup:
    """Who has how many devices."""

    fleet: Fleet
    trainer: Trainer
    num_engine_devices: int
    num_trainer_devices: int
    num_devices: int
    """All of the job's, idle ones too."""
    engine_weight_bytes: int = 0
    """Of one device."""


@dataclass(frozen=True)
class RolloutTimes:
    """What the engines did in a step's rollout: seconds on average over the engines."""

    decode_s: float
    prefill_s: float
    wait_s: float
    """Idle between generations: tools, and workers on other engines."""
    tail_s: float
    """Idle after an engine's last generation: stragglers elsewhere, the last verdicts."""
    mean_running: float
    """Sequences of an engine while it decodes."""
    max_running: int
    last_tenth_s: float
    """From the end of nine tenths of the episodes to that of all."""
    max_open_tokens: int
    """Of conversations that have not ended, on one engine: what its prefix cache has to hold."""
    tool_queue_s: float
    """Mean wait of a call for a free place at the tool servers."""
    episode_s_mean: float
    episode_s_max: float


@dataclass(frozen=True)
class Outcome:
    """One placement."""

    placement: str
    step_s: float
    rollout_s: float
    """That the trainer waits for episodes."""
    score_s: float
    train_s: float
    sync_s: float
    checkpoint_s: float
    switch_s: float
    other_s: float
    rollout: RolloutTimes | None
    """Not of overlapping steps."""
    engines_busy: float
    """Share of a step in which engines prefill or decode, on average over the engines' devices."""
    trainer_busy: float
    tools_busy: float
    """Share of a step in which a place at the tool servers is taken, on average over the places."""
    tokens_per_s: float
    """Sampled."""
    tokens_per_s_device: float
    num_engines: int
    num_trainer_ranks: int
    num_devices: int


def disaggregated(setup: Setup, draw: Draw, num_steps: int) -> Outcome:
    """In turns, on devices of their own; a mean over `num_steps` draws."""
    return _in_turns(setup, draw, num_steps, DISAGGREGATED, 0.0)


def colocated(setup: Setup, draw: Draw, num_steps: int) -> Outcome:
    """In turns, on the same devices."""
    switch_s = setup.trainer.switch_s(setup.engine_weight_bytes)
    return _in_turns(setup, draw, num_steps, COLOCATED, switch_s)


def _in_turns(setup: Setup, draw: Draw, num_steps: int, name: str, switch_s: float) -> Outcome:
    times: list[RolloutTimes] = []
    spans: list[float] = []
    phases: list[Phases] = []
    busy: list[float] = []
    tools_s = tokens = 0.0
    for step in range(1, num_steps + 1):
        episodes, judge_s = draw(step)
        rollout = run_step(setup.fleet, episodes, judge_s)
        spans.append(rollout.steps[1].done)
        times.append(rollout_times(rollout))
        phases.append(setup.trainer.phases(episodes, colocated=name == COLOCATED))
        busy.append(_busy_s(rollout.usages))
        tools_s += rollout.tools.busy_s
        tokens += sum(agent.num_sampled for agent in all_agents(episodes))
    mean = _mean_phases(phases)
    rollout_s = sum(spans) / num_steps
    step_s = rollout_s + mean.total_s + switch_s
    return _outcome(
        setup, name, step_s, rollout_s, mean, switch_s, _mean_times(times),
        engines_s=sum(busy) / num_steps, tools_s=tools_s / num_steps, tokens=tokens / num_steps,
    )  # fmt: skip


def _outcome(
    setup: Setup,
    name: str,
    step_s: float,
    rollout_s: float,
    phases: Phases,
    switch_s: float,
    times: RolloutTimes | None,
    *,
    engines_s: float,
    tools_s: float,
    tokens: float,
) -> Outcome:
    return Outcome(
        placement=name,
        step_s=step_s,
        rollout_s=rollout_s,
        score_s=phases.score_s,
        train_s=phases.train_s,
        sync_s=phases.sync_s,
        checkpoint_s=phases.checkpoint_s,
        switch_s=switch_s,
        other_s=phases.other_s,
        rollout=times,
        engines_busy=engines_s / step_s,
        trainer_busy=(phases.score_s + phases.train_s) / step_s,
        tools_busy=tools_s / step_s / setup.fleet.tool_slots,
        tokens_per_s=tokens / step_s,
        tokens_per_s_device=tokens / step_s / setup.num_devices,
        num_engines=setup.fleet.num_engines,
        num_trainer_ranks=setup.trainer.job.layout.world_size,
        num_devices=setup.num_devices,
    )


def _mean_phases(phases: Sequence[Phases]) -> Phases:
    rows = [asdict(item) for item in phases]
    return Phases(**{key: sum(row[key] for row in rows) / len(rows) for key in rows[0]})


def _mean_times(times: Sequence[RolloutTimes]) -> RolloutTimes:
    """Means; of what is the most of something, the most."""
    rows = [asdict(item) for item in times]
    values: dict[str, Any] = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    values |= {
        "max_running": max(item.max_running for item in times),
        "max_open_tokens": max(item.max_open_tokens for item in times),
        "episode_s_max": max(item.episode_s_max for item in times),
    }
    return RolloutTimes(**values)


def _busy_s(usages: Sequence[Usage]) -> float:
    """Seconds of prefill and decoding, on average over the engines."""
    return sum(usage.decode_s + usage.prefill_s for usage in usages) / len(usages)


def rollout_times(rollout: Rollout) -> RolloutTimes:
    """Of the only step of a rollout."""
    (record,) = rollout.steps.values()
    usages = rollout.usages
    n, span = len(usages), record.done
    decode = sum(usage.decode_s for usage in usages)
    busy = [usage.decode_s + usage.prefill_s for usage in usages]
    ends, durations = sorted(record.ends), record.durations.values()
    return RolloutTimes(
        decode_s=decode / n,
        prefill_s=sum(usage.prefill_s for usage in usages) / n,
        # Sums of many small parts may miss the end of the last one by rounding.
        wait_s=sum(max(0.0, u.last_end - b) for u, b in zip(usages, busy, strict=True)) / n,
        tail_s=sum(span - usage.last_end for usage in usages) / n,
        mean_running=sum(usage.sequence_s for usage in usages) / decode if decode else 0.0,
        max_running=max(usage.max_running for usage in usages),
        last_tenth_s=span - ends[max(0, -(-len(ends) * 9 // 10) - 1)],
        max_open_tokens=rollout.max_open_tokens,
        tool_queue_s=rollout.tools.waited_s / max(1, rollout.tools.num_jobs),
        episode_s_mean=sum(durations) / len(durations),
        episode_s_max=max(durations),
    )


class _Pipeline:
    """An asynchronous run: the trainer beside a rollout that goes on."""

    def __init__(self, setup: Setup, draw: Draw, staleness: int, num_steps: int) -> None:
        self._trainer = setup.trainer
        self._draw = draw
        self._staleness = staleness
        self._num_steps = num_steps
        self.rollout = Rollout(setup.fleet, self._collected)
        self._ready: set[int] = set()
        self._next = 1
        self._is_training = False
        self.pushed: list[float] = []
        """Time of every push's end."""
        self.busy: list[float] = []
        """Seconds of the engines up to then, on average."""
        self.tools_s: list[float] = []
        """Seconds of calls up to then, over all places."""
        self.phases: dict[int, Phases] = {}
        self.tokens: dict[int, int] = {}

    def run(self) -> None:
        """All steps."""
        for step in range(1, min(self._num_steps, 1 + self._staleness) + 1):
            self._release(0.0, step)
        self.rollout.run()

    def _release(self, now: float, step: int) -> None:
        episodes, judge_s = self._draw(step)
        self.phases[step] = self._trainer.phases(episodes)
        self.tokens[step] = sum(agent.num_sampled for agent in all_agents(episodes))
        self.rollout.release(now, step, episodes, judge_s)

    def _collected(self, step: int, now: float) -> None:
        self._ready.add(step)
        self._train(now)

    def _train(self, now: float) -> None:
        if self._is_training or self._next not in self._ready:
            return
        self._is_training = True
        phases = self.phases[self._next]
        self.rollout.at(now + phases.total_s - phases.sync_s, self._push)

    def _push(self, now: float) -> None:
        seconds = self.phases[self._next].sync_s
        self.rollout.pause(now, seconds)
        self.rollout.at(now + seconds, self._end_push)

    def _end_push(self, now: float) -> None:
        self.pushed.append(now)
        self.busy.append(_busy_s(self.rollout.usages))
        self.tools_s.append(self.rollout.tools.busy_s)
        self._is_training = False
        following = self._next + 1 + self._staleness
        self._next += 1
        if following <= self._num_steps:
            self._release(now, following)
        self._train(now)


def asynchronous(setup: Setup, draw: Draw, num_steps: int, staleness: int) -> Outcome:
    """Overlapping steps; a mean over at least `num_steps` of them, after some to warm up.

    `staleness` (at least 1) is `rollout.max_staleness`. Steps may come in bursts of 1 + staleness,
    as they began together, so that whole bursts are counted.
    """
    assert staleness >= 1
    num_steps = -(-num_steps // (1 + staleness)) * (1 + staleness)
    first = _WARM_UP + staleness
    last = first + num_steps
    # The engines are to be as busy in the last step that counts as in those before.
    pipeline = _Pipeline(setup, draw, staleness, last + staleness)
    pipeline.run()
    counted = range(first + 1, last + 1)
    step_s = (pipeline.pushed[last - 1] - pipeline.pushed[first - 1]) / num_steps
    mean = _mean_phases([pipeline.phases[step] for step in counted])
    busy = pipeline.busy[last - 1] - pipeline.busy[first - 1]
    return _outcome(
        setup, ASYNCHRONOUS, step_s, max(0.0, step_s - mean.total_s), mean, 0.0, None,
        engines_s=busy / num_steps,
        tools_s=(pipeline.tools_s[last - 1] - pipeline.tools_s[first - 1]) / num_steps,
        tokens=sum(pipeline.tokens[step] for step in counted) / num_steps,
    )  # fmt: skip
