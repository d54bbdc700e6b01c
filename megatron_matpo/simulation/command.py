"""`matpo simulate`: reads a recipe, rates and lengths, and compares placements. Starts nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from megatron_matpo.config import Config
from megatron_matpo.errors import ConfigError
from megatron_matpo.planning.command import Expectation, RunPlan, make_run_plan
from megatron_matpo.planning.ledger import worst_stage
from megatron_matpo.planning.parameters import total_parameters
from megatron_matpo.planning.pipeline import bubble_frac
from megatron_matpo.simulation.calibrate import Calibration, calibrate, fleet_of
from megatron_matpo.simulation.draws import choose_draws
from megatron_matpo.simulation.engine import EngineRates
from megatron_matpo.simulation.episodes import Agent, agents_of, all_agents
from megatron_matpo.simulation.placements import (
    Draw,
    Outcome,
    Setup,
    asynchronous,
    colocated,
    disaggregated,
)
from megatron_matpo.simulation.rates import (
    Rates,
    check_gpu,
    choose_rates,
    engine_rates,
)
from megatron_matpo.simulation.training import Trainer

_BUSY = 0.7
"""From here on a queue is long most of the time."""


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    recipe: str
    overrides: list[str]
    rates: str = ""
    """File."""
    lengths: str = ""
    """File of distributions, `step_N.jsonl`, or a run's folder."""
    from_run: tuple[str, ...] = ()
    """Folders of runs."""
    fit_steps: tuple[int, int] | None = None
    """Of these runs: first and last step to learn from."""
    staleness: int = 0
    """Of the asynchronous placement; 0: the recipe's, at least 1."""
    num_steps: int = 2
    """Draws that each placement is averaged over."""


@dataclass(frozen=True)
class Simulation:
    """All that `matpo simulate` says."""

    request: Request
    config: Config
    rates: Rates
    engine: EngineRates
    kv_tokens: int
    lengths_source: str
    staleness: int
    """Of the asynchronous placement."""
    num_episodes: int
    mean_agents: float
    """Contexts per episode, the planner's own included."""
    mean_turns: float
    """Generations per episode."""
    mean_tokens: float
    """Length of a context."""
    mean_sampled: float
    """Sampled tokens per episode."""
    num_updates: int
    """Of the trainer, in the first step drawn."""
    micro_batches: int
    """Of an update on one data-parallel rank, with the recipe's layout."""
    bubble_frac: float
    """Share of an update in which a pipeline stage waits."""
    outcomes: tuple[Outcome, ...]
    """The recipe's own placement first."""
    warnings: tuple[str, ...]
    fit_error: float | None = None
    """Of durations that rates were fitted to, as a factor minus 1."""


def simulate(request: Request) -> Simulation:
    """Simulate.

    Raises:
        ConfigError: the recipe is wrong or does not fit its devices, there are no rates for them,
            or a file is not what it should be.
    """
    plan = make_run_plan(request.recipe, request.overrides, Expectation(), proposals=False)
    config = plan.config
    if request.num_steps < 1:
        raise ConfigError(f"--steps={request.num_steps}: must be at least 1")
    if request.staleness < 0:
        raise ConfigError(f"--staleness={request.staleness}: must be at least 1")
    if request.fit_steps and not request.from_run:
        raise ConfigError("--fit-steps: only with --from-run")
    fit = calibrate(request.from_run, request.fit_steps) if request.from_run else None
    if fit and not request.rates:
        rates = check_gpu(fit.rates, config, "--from-run")
    else:
        rates = choose_rates(config, request.rates)
    engine = engine_rates(rates, config, plan.job.hf, plan.gpu, total_parameters(plan.job))
    draw, source = choose_draws(request.lengths, config, fit)
    site = _Site(plan, rates, engine)
    _refuse_misfits(plan, site, draw(1)[0])
    outcomes, warnings = _place(site, draw, request)
    return _described(request, site, draw, source, outcomes, warnings, fit)


@dataclass(frozen=True)
class _Site:
    """The recipe's devices with their rates."""

    plan: RunPlan
    rates: Rates
    engine: EngineRates

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def num_devices(self) -> int:
        """All GPUs; on a CPU every process counts as one."""
        cluster = self.config.cluster
        if cluster.device == "cuda":
            return cluster.num_nodes * cluster.gpus_per_node
        return self.engine_devices + self.plan.job.layout.world_size

    @property
    def engine_devices(self) -> int:
        rollout = self.config.rollout
        return rollout.num_servers * rollout.tensor

    @property
    def is_colocated(self) -> bool:
        """Engines and ranks do not fit beside each other."""
        return self.engine_devices + self.plan.job.layout.world_size > self.num_devices

    @property
    def kv_tokens(self) -> int:
        """Cache of one engine."""
        if self.plan.engine:
            return self.plan.engine.kv_tokens
        rollout = self.config.rollout
        return rollout.max_total_tokens or rollout.max_running_requests * rollout.context_length

    def setup(self, num_engines: int, data: int) -> Setup | None:
        """With so many engines and replicas; None if the layout does not allow it."""
        layout = replace(self.plan.job.layout, data=data)
        if num_engines < 1 or data < 1 or layout.tensor * layout.context * data % layout.expert:
            return None
        job = replace(self.plan.job, layout=layout)
        cache = self.rates.cache
        fleet = replace(
            fleet_of(self.config, self.engine, self.kv_tokens),
            num_engines=num_engines,
            prefix_hit=cache.prefix_hit,
            prompt_hit=cache.prompt_hit,
        )
        trainer = Trainer(self.config, job, self.plan.gpu, self.rates.train, self.rates.move)
        return Setup(
            fleet=fleet,
            trainer=trainer,
            num_engine_devices=num_engines * self.config.rollout.tensor,
            num_trainer_devices=layout.world_size,
            num_devices=self.num_devices,
            engine_weight_bytes=self.plan.engine.weights if self.plan.engine else 0,
        )


def _refuse_misfits(plan: RunPlan, site: _Site, episodes: Sequence[Agent]) -> None:
    config = plan.config
    problems = list(plan.problems)
    if site.is_colocated:  # is known and no mistake: more ranks than the engines leave
        problems = [problem for problem in problems if not problem.startswith("parallel: ")]
    if plan.job.layout.world_size > site.num_devices or site.engine_devices > site.num_devices:
        problems += [
            f"{plan.job.layout.world_size} trainer ranks and {site.engine_devices} engine devices: "
            f"more than the {site.num_devices} of the recipe"
        ]
    longest = max(agent.num_tokens for agent in all_agents(episodes))
    if longest > config.rollout.context_length:
        problems.append(
            f"a recorded context has {longest} tokens, rollout.context_length is "
            f"{config.rollout.context_length}"
        )
    elif longest > site.kv_tokens:
        problems.append(
            f"a context has {longest} tokens, an engine's cache only {site.kv_tokens}; raise "
            "rollout.tensor, rollout.mem_fraction or rollout.max_total_tokens"
        )
    if problems:
        raise ConfigError("the recipe does not fit:\n" + "\n".join(problems))


def _place(site: _Site, draw: Draw, request: Request) -> tuple[list[Outcome], list[str]]:
    """The placements that the devices allow, the recipe's own first."""
    config, layout, num_steps = site.config, site.plan.job.layout, request.num_steps
    warnings: list[str] = []
    engines, data = config.rollout.num_servers, layout.data
    per_replica = layout.tensor * layout.context * layout.pipeline
    if site.is_colocated:
        half = site.num_devices // 2
        engines, data = half // config.rollout.tensor, half // per_replica
        warnings.append(
            f"disaggregated: half of the devices for {engines} engines, half for {data} replicas"
        )
    apart = site.setup(engines, data)
    outcomes: list[Outcome] = []
    if apart:
        outcomes.append(disaggregated(apart, draw, num_steps))
        outcomes.append(asynchronous(apart, draw, num_steps, _staleness(request, config)))
        if config.rollout.max_staleness:
            outcomes.reverse()
    if config.cluster.device == "cuda":
        everywhere = site.num_devices
        together = site.setup(everywhere // config.rollout.tensor, everywhere // per_replica)
        if together:
            outcome = colocated(together, draw, num_steps)
            outcomes.insert(0 if site.is_colocated else len(outcomes), outcome)
            warnings += _memory_warnings(site, together)
    warnings += _deadline_warnings(config, outcomes)
    warnings += _tool_warnings(outcomes)
    if site.rates.cache.prefix_hit == 1:
        warnings += _cache_warnings(site.kv_tokens, outcomes)
    return outcomes, warnings


def _staleness(request: Request, config: Config) -> int:
    return request.staleness or max(1, config.rollout.max_staleness)


def _memory_warnings(site: _Site, setup: Setup) -> list[str]:
    """A layout of all GPUs is the recipe's with more replicas; it needs less, if anything."""
    need, have = worst_stage(setup.trainer.job, 1).total, site.plan.memory
    if not have or need <= have:
        return []
    return [f"colocated: the trainer needs {need / 2**30:.1f} GiB of {have / 2**30:.1f}"]


def _tool_warnings(outcomes: Sequence[Outcome]) -> list[str]:
    return [
        f"{outcome.placement}: the tool servers' places are taken {100 * outcome.tools_busy:.0f} % "
        "of a step; more of them (tools.servers.*.max_concurrency) would shorten it"
        for outcome in outcomes
        if outcome.tools_busy > _BUSY
    ]


def _cache_warnings(kv_tokens: int, outcomes: Sequence[Outcome]) -> list[str]:
    return [
        f"{outcome.placement}: up to {outcome.rollout.max_open_tokens} tokens of open "
        f"conversations on an engine whose cache holds {kv_tokens}: contexts will be computed "
        "again; lower cache.prefix_hit in the rates"
        for outcome in outcomes
        if outcome.rollout and outcome.rollout.max_open_tokens > kv_tokens
    ]


def _deadline_warnings(config: Config, outcomes: Sequence[Outcome]) -> list[str]:
    found: list[str] = []
    for outcome in outcomes:
        times = outcome.rollout
        if times and times.episode_s_max > config.rollout.episode_timeout_s:
            found.append(
                f"{outcome.placement}: the longest episode takes {times.episode_s_max:.0f} s, "
                f"rollout.episode_timeout_s is {config.rollout.episode_timeout_s:g}"
            )
        if times and outcome.rollout_s > config.rollout.step_timeout_s:
            found.append(
                f"{outcome.placement}: a rollout takes {outcome.rollout_s:.0f} s, "
                f"rollout.step_timeout_s is {config.rollout.step_timeout_s:g}"
            )
    return found


def _described(
    request: Request,
    site: _Site,
    draw: Draw,
    source: str,
    outcomes: Sequence[Outcome],
    warnings: Sequence[str],
    fit: Calibration | None,
) -> Simulation:
    episodes = draw(1)[0]
    agents = all_agents(episodes)
    lengths = [agent.num_tokens for agent in agents]
    own = site.setup(1, site.plan.job.layout.data)
    assert own is not None, "the recipe's layout was checked by its plan"
    updates = own.trainer.num_updates(len(episodes), len(agents))
    count = own.trainer.micro_batches(lengths, updates)
    return Simulation(
        request=request,
        config=site.config,
        rates=site.rates,
        engine=site.engine,
        kv_tokens=site.kv_tokens,
        lengths_source=source,
        staleness=_staleness(request, site.config),
        num_episodes=len(episodes),
        mean_agents=len(agents) / len(episodes),
        mean_turns=sum(len(a.turns) for e in episodes for a in agents_of(e)) / len(episodes),
        mean_tokens=sum(lengths) / len(lengths),
        mean_sampled=sum(agent.num_sampled for agent in agents) / len(episodes),
        num_updates=updates,
        micro_batches=count,
        bubble_frac=bubble_frac(site.plan.job.layout, count),
        outcomes=tuple(outcomes),
        warnings=tuple(warnings),
        fit_error=fit.mean_error if fit else None,
    )


def as_json(simulation: Simulation) -> str:
    """For programs."""
    return json.dumps(
        {
            "recipe": simulation.request.recipe,
            "source": simulation.rates.source,
            "rates": asdict(simulation.rates),
            "engine": asdict(simulation.engine),
            "kv_tokens": simulation.kv_tokens,
            "lengths": simulation.lengths_source,
            "staleness": simulation.staleness,
            "episodes": simulation.num_episodes,
            "contexts_per_episode": simulation.mean_agents,
            "generations_per_episode": simulation.mean_turns,
            "tokens_per_context": simulation.mean_tokens,
            "sampled_per_episode": simulation.mean_sampled,
            "updates": simulation.num_updates,
            "micro_batches": simulation.micro_batches,
            "bubble_frac": simulation.bubble_frac,
            "fit_error": simulation.fit_error,
            "placements": [asdict(outcome) for outcome in simulation.outcomes],
            "warnings": list(simulation.warnings),
        },
        indent=2,
    )
