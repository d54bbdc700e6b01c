"""Rates of a run that was made: `--from-run RUN_DIR...`.

The engine's five numbers are fitted by simulating the recorded steps again, with the recorded
episodes and tool latencies, until durations of episodes and of the collection agree best (mean
squared logarithm of the ratio). Where turns are all equally long, nothing tells a step's cost from
a prefill's: of fits that are equally good the one is taken in which these two, each a pass over the
weights, are alike. One run has one concurrency, and from that alone the cost of a step
and the cost of a sequence in it cannot be told apart well: for a recipe with another number of
episodes, give two runs, a small and a large one. The trainer's two numbers are least squares over
the operations of the steps. The first step of a run warms up and is left out if there are others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.load import load_resolved
from megatron_matpo.errors import ConfigError
from megatron_matpo.planning.shape import job_of
from megatron_matpo.simulation.engine import EngineRates
from megatron_matpo.simulation.episodes import all_agents
from megatron_matpo.simulation.fit import line, minimise
from megatron_matpo.simulation.rates import MeasuredEngine, MoveRates, Rates, TrainRates
from megatron_matpo.simulation.records import RecordedEpisode, RecordedStep, read_run
from megatron_matpo.simulation.rollout import Fleet, run_step
from megatron_matpo.simulation.training import Trainer

_MAX_STEPS = 3
"""Of each run that the engine is fitted to; more take longer and change little."""
_MAX_CALLS = 220
_ALIKE = 0.002
"""Weight of the squared logarithm of prefill over step: a tenth of a usual loss where they differ
by a factor of 2."""
_MIN_S = 1e-3
"""Durations are recorded to the millisecond."""


@dataclass(frozen=True)
class Calibration:
    """What a set of runs says."""

    rates: Rates
    episodes: tuple[RecordedEpisode, ...]
    """All recorded episodes of the steps that were used."""
    judge_s: float
    """Mean; 0 without a judge."""
    mean_error: float
    """Of the fitted durations, as a factor minus 1."""


@dataclass(frozen=True)
class _Run:
    config: Config
    steps: tuple[RecordedStep, ...]


def calibrate(run_dirs: Sequence[str], steps: tuple[int, int] | None = None) -> Calibration:
    """Fit rates to the steps `steps` (first and last) of runs, or to all but the first.

    Raises:
        ConfigError: a folder is no run, has no such step, or the runs have different models.
    """
    runs = [_read(run_dir, steps) for run_dir in run_dirs]
    machines = {
        (run.config.model.path, run.config.cluster.gpu, run.config.rollout.tensor) for run in runs
    }
    if len(machines) > 1:
        raise ConfigError(
            "--from-run: the runs differ in model.path, cluster.gpu or rollout.tensor"
        )
    fitted, loss = _fit_engine(runs)
    config = runs[0].config
    used = [step for run in runs for step in run.steps]
    rates = Rates(
        source=f"fitted to {len(used)} steps of {', '.join(run_dirs)}",
        gpu=config.cluster.gpu,
        model=config.model.path,
        engine=MeasuredEngine(
            step_s=fitted[0],
            per_sequence_s=fitted[1],
            prefill_s=fitted[2],
            prefill_token_s=fitted[3],
            request_s=fitted[4],
            tensor=config.rollout.tensor,
        ),
        train=_fit_trainer(runs),
        move=MoveRates(push_s=_median(used, "time/sync_s")),
    )
    return Calibration(
        rates,
        tuple(episode for step in used for episode in step.episodes),
        _median(used, "judge/latency_s_mean"),
        math.exp(math.sqrt(loss)) - 1,
    )


def _read(run_dir: str, steps: tuple[int, int] | None) -> _Run:
    known = read_run(run_dir)
    if steps:
        chosen = [step for step in known if steps[0] <= step.step <= steps[1]]
    else:
        chosen = known[1:] or known
    chosen = [step for step in chosen if step.episodes]
    if not chosen:
        first, last = steps or (1, known[-1].step)
        raise ConfigError(
            f"--from-run={run_dir}: no usable recording of steps {first}-{last} in it; it has "
            f"steps {known[0].step}-{known[-1].step}"
        )
    return _Run(load_resolved(f"{run_dir}/config.yaml"), tuple(chosen))


def fleet_of(config: Config, rates: EngineRates, kv_tokens: int) -> Fleet:
    """What the recipe's episodes run on."""
    servers = _tool_slots(config)
    return Fleet(
        num_engines=config.rollout.num_servers,
        rates=rates,
        max_running=config.rollout.max_running_requests,
        kv_tokens=kv_tokens,
        max_concurrent=config.rollout.max_concurrent_episodes,
        tool_slots=servers,
        judge_slots=config.reward.judge.max_concurrency,
    )


def _tool_slots(config: Config) -> int:
    """Calls in flight over the servers that the recipe's agents may call."""
    planner = config.agents.get(config.rollout.planner)
    names = set(planner.tools if planner else [])
    names |= {tool for name in names if name in config.agents for tool in config.agents[name].tools}
    slots = [s.max_concurrency for name, s in config.tools.servers.items() if name in names]
    return max(1, sum(slots))


def _fit_engine(runs: Sequence[_Run]) -> tuple[list[float], float]:
    """(step, per sequence, prefill, per prefill token, request) in seconds, and the loss."""
    steps = [(run.config, step) for run in runs for step in run.steps[:_MAX_STEPS]]

    def error(values: Sequence[float]) -> float:
        rates = EngineRates(
            overhead_s=values[0],
            per_sequence_s=values[1],
            prefill_base_s=values[2],
            prefill_token_s=values[3],
            request_s=values[4],
        )
        return sum(_loss(config, rates, step) for config, step in steps) / len(steps) / 2

    def loss(values: Sequence[float]) -> float:
        return error(values) + _ALIKE * math.log(values[2] / values[0]) ** 2

    # Any sensible start: an engine that samples all tokens of the first step one after another
    # would need a hundredth of that for each at a concurrency of a hundred.
    config, first = steps[0]
    sampled = sum(agent.num_sampled for agent in all_agents([e.planner for e in first.episodes]))
    collected = _collect_s(first)
    token_s = collected * config.rollout.num_servers / max(1, sampled)
    start = (10 * token_s, token_s / 3, 10 * token_s, token_s / 10, 5 * token_s)
    best = minimise(loss, start, _MAX_CALLS)
    return best, error(best)


def _loss(config: Config, rates: EngineRates, step: RecordedStep) -> float:
    kv_tokens = config.rollout.max_total_tokens or 2**62
    rollout = run_step(
        fleet_of(config, rates, kv_tokens), [episode.planner for episode in step.episodes]
    )
    record = rollout.steps[1]
    errors = [
        math.log(max(_MIN_S, record.durations[index]) / max(_MIN_S, episode.duration_s)) ** 2
        for index, episode in enumerate(step.episodes)
    ]
    return sum(errors) / len(errors) + math.log(record.done / _collect_s(step)) ** 2


def _collect_s(step: RecordedStep) -> float:
    return max(_MIN_S, step.metrics.get("time/collect_s", 0.0))


def _fit_trainer(runs: Sequence[_Run]) -> TrainRates:
    """Seconds of an update and per operation; the rest of a step.

    A step's work is its training time on ranks that make one TFLOP/s, so that recomputation, bubble
    and the longest trajectory count as they do in a forecast.
    """
    work: list[float] = []
    spent: list[float] = []
    rest: list[float] = []
    for run in runs:
        hf = HfModelConfig.from_folder(run.config.model.path)
        unit = TrainRates(tflops_per_device=1.0)
        trainer = Trainer(run.config, job_of(run.config, hf), None, unit, MoveRates())
        for step in run.steps:
            planners = [episode.planner for episode in step.episodes]
            updates = trainer.num_updates(len(planners), len(all_agents(planners)))
            phases = trainer.phases(planners)
            work.append(phases.train_s / updates)
            spent.append(step.metrics["time/train_s"] / updates)
            names = ("collect", "score", "train", "sync")
            known = sum(step.metrics[f"time/{name}_s"] for name in names)
            rest.append(step.metrics["time/step_s"] - known)
    fixed, per_tflop = line(work, spent)
    if per_tflop == 0:  # no difference between the steps shows: all of it is the operations'
        fixed, per_tflop = 0.0, statistics.median(s / w for s, w in zip(spent, work, strict=True))
    return TrainRates(
        tflops_per_device=1 / per_tflop,
        update_s=fixed,
        step_s=max(0.0, statistics.median(rest)),
    )


def _median(steps: Sequence[RecordedStep], name: str) -> float:
    return statistics.median(step.metrics.get(name) or 0.0 for step in steps)
