"""`matpo plan`: reads a recipe, reckons, and returns the text or JSON to print. Starts nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_matpo.config import Config, load_recipe
from megatron_matpo.config.gpus import Gpu, find_gpu
from megatron_matpo.config.hf_model import HfModelConfig, check_layout
from megatron_matpo.config.precision import Precision, token_multiple
from megatron_matpo.errors import ConfigError
from megatron_matpo.planning.batches import Workload, assumed_workload, measured_workload
from megatron_matpo.planning.engines import EngineMemory, engine_memory
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
    own: Proposal
    """The recipe's own layout."""
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
        """The stage that needs most."""
        return self.own.ledger


_UNKNOWN = Gpu("unknown", 0.0, 312, 0, (8, 0), 400)
"""Stands in where only an order of layouts would need a GPU."""


def make_run_plan(recipe: str, overrides: list[str], expectation: Expectation) -> RunPlan:
    """Reckon.

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
    site = Site(gpu or _UNKNOWN, trainer_gpus(config), max(1, config.cluster.gpus_per_node))
    budget, updates = config.train.micro_batch_tokens, config.algo.updates_per_step
    own = appraise(job, site, workload, budget, updates)
    stages = tuple(stage_ledger(job, i, own.num_micro_batches) for i in range(job.layout.pipeline))
    engine = (
        engine_memory(hf, total_parameters(job), config.rollout, job.bucket_mb, gpu.memory_gib)
        if gpu
        else None
    )
    return RunPlan(
        recipe=recipe,
        config=config,
        job=job,
        gpu=gpu,
        precision=precision_of(config),
        workload=workload,
        own=own,
        stages=stages,
        engine=engine,
        problems=tuple(_problems(config, job, own, gpu, engine)),
        proposals=tuple(propose(job, site, workload, budget, updates)) if gpu else (),
    )


def _rounded(job: Job, config: Config) -> Job:
    """The micro-batch with the padding that the layout and FP8 need."""
    multiple = token_multiple(config, precision_of(config))
    return replace(job, micro_batch_tokens=-(-job.micro_batch_tokens // multiple) * multiple)


def trainer_gpus(config: Config) -> int:
    """GPUs that the engines leave; without GPUs the recipe's own ranks."""
    cluster, rollout = config.cluster, config.rollout
    if cluster.device == "cpu":
        return config.parallel.world_size
    engines = 0 if rollout.replay else rollout.num_servers * rollout.tensor
    return max(0, cluster.num_nodes * cluster.gpus_per_node - engines)


def _problems(
    config: Config, job: Job, own: Proposal, gpu: Gpu | None, engine: EngineMemory | None
) -> list[str]:
    """What does not fit, one line each."""
    found: list[str] = []
    if config.cluster.device == "cuda" and job.layout.world_size > trainer_gpus(config):
        found.append(
            f"parallel: {job.layout.world_size} trainer ranks, but the engines leave "
            f"{trainer_gpus(config)} of {config.cluster.num_nodes} x "
            f"{config.cluster.gpus_per_node} GPUs"
        )
    if job.layout.tensor > max(1, config.cluster.gpus_per_node) > 0 and gpu:
        found.append(f"parallel.tensor={job.layout.tensor}: more than the GPUs of a node")
    if gpu and own.ledger.total > gpu.memory_gib * 2**30:
        found.append(
            f"trainer: needs {_gib(own.ledger.total)} GiB on stage {own.ledger.stage}; {gpu.name} "
            f"has {gpu.memory_gib:.1f}"
        )
    if engine and engine.full_trajectories < 1:
        found.append(
            f"engine: room for {max(0, engine.kv_tokens)} tokens of KV cache, a trajectory may "
            f"have {config.rollout.context_length}; raise rollout.tensor or rollout.mem_fraction"
        )
    return found


def as_json(plan: RunPlan) -> str:
    """For programs."""
    return json.dumps(
        {
            "recipe": plan.recipe,
            "gpu": asdict(plan.gpu) if plan.gpu else None,
            "precision": asdict(plan.precision),
            "parameters": total_parameters(plan.job),
            "layout": asdict(plan.job.layout),
            "micro_batch_tokens": plan.job.micro_batch_tokens,
            "micro_batches": plan.own.num_micro_batches,
            "bubble_frac": bubble_frac(plan.job.layout, plan.own.num_micro_batches),
            "assumption": plan.workload.assumption,
            "worst_stage": _ledger_json(plan.worst),
            "stages": [_ledger_json(stage) for stage in plan.stages],
            "engine": asdict(plan.engine) if plan.engine else None,
            "problems": list(plan.problems),
            "proposals": [
                {
                    "layout": asdict(item.layout),
                    "total": item.ledger.total,
                    "host": item.ledger.host,
                    "micro_batches": item.num_micro_batches,
                }
                for item in plan.proposals
            ],
        },
        indent=2,
    )


def _ledger_json(ledger: Ledger) -> dict[str, Any]:
    return {**asdict(ledger), "total": ledger.total}


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"
