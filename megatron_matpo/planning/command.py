"""`matpo plan`: reads a recipe, reckons, and returns the text or JSON to print. Starts nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_matpo.config import Config, load_recipe
from megatron_matpo.config.gpus import Gpu, find_gpu
from megatron_matpo.config.hf_model import HfModelConfig, check_layout
from megatron_matpo.config.precision import Precision, token_multiple
from megatron_matpo.errors import ConfigError
from megatron_matpo.planning.batches import Workload, assumed_workload, measured_workload
from megatron_matpo.planning.colocated import Phase, phases
from megatron_matpo.planning.engines import (
    EngineMemory,
    engine_gpus,
    engine_memory,
    engine_problems,
)
from megatron_matpo.planning.layouts import Proposal, Site, appraise, propose
from megatron_matpo.planning.ledger import Ledger, stage_ledger
from megatron_matpo.planning.parameters import total_parameters
from megatron_matpo.planning.pipeline import bubble_frac
from megatron_matpo.planning.shape import Job, job_of, precision_of


@dataclass(frozen=True)
class Expectation:
    """What the user knows of the trajectories; the rest is assumed."""

    lengths: str = ""
    """File of trajectory lengths."""
    mean_tokens: int = 0
    workers: float = -1.0


@dataclass(frozen=True)
class RunPlan:
    """All that `matpo plan` says."""

    recipe: str
    config: Config
    job: Job
    gpu: Gpu | None
    precision: Precision
    workload: Workload
    own: Proposal | None
    """The recipe's own layout; None for an evaluation, which has no trainer."""
    stages: tuple[Ledger, ...]
    engine: EngineMemory | None
    problems: tuple[str, ...]
    proposals: tuple[Proposal, ...]

    @property
    def memory(self) -> int:
        """Bytes of a GPU; 0 if unknown."""
        return int(self.gpu.memory_gib * 2**30) if self.gpu else 0

    @property
    def worst(self) -> Ledger:
        """The stage that needs most while it trains."""
        assert self.own is not None, "an evaluation has no trainer"
        return self.own.ledger

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Of a step, on one GPU of the worst stage, where engines are on the trainer's GPUs."""
        is_shared = self.config.cluster.placement == "colocated"
        return phases(self.worst, self.engine) if self.own and self.engine and is_shared else ()


_UNKNOWN = Gpu("unknown", 0.0, 312, 0, (8, 0), 400)
"""Stands in where only an order of layouts would need a GPU."""


def make_run_plan(
    recipe: str, overrides: list[str], expectation: Expectation, *, proposals: bool = True
) -> RunPlan:
    """Reckon; other layouts are looked for only if `proposals` are wanted.

    Raises:
        ConfigError: the recipe is wrong, has no `model.path` with a `config.json`, or its layout
            does not divide the model.
    """
    config = load_recipe(recipe, overrides)
    if not config.model.path:
        raise ConfigError("model.path=: expected a folder with the model's config.json")
    hf = HfModelConfig.from_folder(config.model.path)
    if problems := check_layout(hf, config.parallel, on_gpu=config.cluster.device == "cuda"):
        raise ConfigError("\n".join(problems))
    job = _rounded(job_of(config, hf), config)
    gpu = find_gpu(config.cluster.gpu)
    workload = (
        measured_workload(config, expectation.lengths)
        if expectation.lengths
        else assumed_workload(config, expectation.mean_tokens, expectation.workers)
    )
    engine = (
        engine_memory(hf, total_parameters(job), config.rollout, job.bucket_mb, gpu.memory_gib)
        if gpu and not config.rollout.replay
        else None
    )
    own, found = None, ()
    if not config.is_evaluation:
        site = Site(
            gpu or _UNKNOWN,
            trainer_gpus(config),
            max(1, config.cluster.gpus_per_node),
            engine if config.cluster.placement == "colocated" else None,
        )
        budget, updates = config.train.micro_batch_tokens, config.algo.updates_per_step
        own = appraise(job, site, workload, budget, updates)
        found = tuple(propose(job, site, workload, budget, updates)) if gpu and proposals else ()
    return RunPlan(
        recipe=recipe,
        config=config,
        job=job,
        gpu=gpu,
        precision=precision_of(config),
        workload=workload,
        own=own,
        stages=_stages(job, own),
        engine=engine,
        problems=(*_trainer_problems(config, own, gpu), *engine_problems(config, engine)),
        proposals=found,
    )


def _stages(job: Job, own: Proposal | None) -> tuple[Ledger, ...]:
    stages = range(job.layout.pipeline) if own else ()
    return tuple(stage_ledger(job, i, own.num_micro_batches) for i in stages if own)


def _rounded(job: Job, config: Config) -> Job:
    """The micro-batch with the padding that the layout and FP8 need."""
    multiple = token_multiple(config, precision_of(config))
    return replace(job, micro_batch_tokens=-(-job.micro_batch_tokens // multiple) * multiple)


def trainer_gpus(config: Config) -> int:
    """GPUs that the engines leave, all if they share; without GPUs the recipe's own ranks."""
    cluster = config.cluster
    if cluster.device == "cpu":
        return config.parallel.world_size
    everything = cluster.num_nodes * cluster.gpus_per_node
    is_shared = cluster.placement == "colocated"
    return everything if is_shared else max(0, everything - engine_gpus(config))


def _trainer_problems(config: Config, own: Proposal | None, gpu: Gpu | None) -> Iterator[str]:
    """What of the trainer does not fit, one line each."""
    if own is None:
        return
    cluster, ranks = config.cluster, own.layout.world_size
    if cluster.device == "cuda" and ranks > trainer_gpus(config):
        leave = "there are" if cluster.placement == "colocated" else "the engines leave"
        yield (
            f"parallel: {ranks} trainer ranks, but {leave} {trainer_gpus(config)} of "
            f"{cluster.num_nodes} x {cluster.gpus_per_node} GPUs"
        )
    if own.layout.tensor > max(1, cluster.gpus_per_node) > 0 and gpu:
        yield f"parallel.tensor={own.layout.tensor}: more than the GPUs of a node"
    if gpu and own.ledger.total > gpu.memory_gib * 2**30:
        yield (
            f"trainer: needs {_gib(own.ledger.total)} GiB on stage {own.ledger.stage}; {gpu.name} "
            f"has {gpu.memory_gib:.1f}"
        )
    elif gpu and own.peak > gpu.memory_gib * 2**30:
        yield (
            f"trainer and engine on one GPU: need {_gib(own.peak)} GiB in the worst phase of a "
            f"step; {gpu.name} has {gpu.memory_gib:.1f}; lower rollout.mem_fraction, or split the "
            "trainer further"
        )


def as_json(plan: RunPlan) -> str:
    """For programs."""
    return json.dumps(
        {
            "recipe": plan.recipe,
            "gpu": asdict(plan.gpu) if plan.gpu else None,
            "precision": asdict(plan.precision),
            "parameters": total_parameters(plan.job),
            **_trainer_json(plan),
            "assumption": plan.workload.assumption,
            "engine": asdict(plan.engine) if plan.engine else None,
            "engine_gpus": engine_gpus(plan.config),
            "problems": list(plan.problems),
            "proposals": [
                {
                    "layout": asdict(item.layout),
                    "total": item.ledger.total,
                    "peak": item.peak,
                    "host": item.host,
                    "micro_batches": item.num_micro_batches,
                }
                for item in plan.proposals
            ],
        },
        indent=2,
    )


def _trainer_json(plan: RunPlan) -> dict[str, Any]:
    """Nothing for an evaluation."""
    if plan.own is None:
        return {}
    return {
        "layout": asdict(plan.job.layout),
        "micro_batch_tokens": plan.job.micro_batch_tokens,
        "micro_batches": plan.own.num_micro_batches,
        "bubble_frac": bubble_frac(plan.job.layout, plan.own.num_micro_batches),
        "worst_stage": _ledger_json(plan.worst),
        "stages": [_ledger_json(stage) for stage in plan.stages],
        "phases": [{**asdict(phase), "total": phase.total} for phase in plan.phases],
        "peak": plan.own.peak,
        "host": plan.own.host,
    }


def _ledger_json(ledger: Ledger) -> dict[str, Any]:
    return {**asdict(ledger), "total": ledger.total}


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"
