"""Wiring: the one place that chooses which object does what, from the configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import distributed as dist

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.plan import Plan
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.parallel import ParallelState
from megatron_matpo.rollout.client import ManagerClient
from megatron_matpo.rollout.engine_client import EngineClient
from megatron_matpo.trainer.actor import build_actor
from megatron_matpo.trainer.clock import Clock
from megatron_matpo.trainer.learner import PolicyLearner
from megatron_matpo.trainer.membership import ManagerMembership
from megatron_matpo.trainer.rollouts import ManagerRollouts, ReplayRollouts, Rollouts, share_bytes
from megatron_matpo.trainer.run import Run, RunLog, WeightSync
from megatron_matpo.trainer.stopping import is_stop_agreed
from megatron_matpo.trainer.throughput import Throughput
from megatron_matpo.weight_sync.broadcast import BroadcastTransport
from megatron_matpo.weight_sync.disk import DiskTransport
from megatron_matpo.weight_sync.layout import EngineShape
from megatron_matpo.weight_sync.membership import Recovery
from megatron_matpo.weight_sync.transaction import NoEngines, PushOnce, Transaction, Transport
from megatron_matpo.weight_sync.verify import Verifier

SHARE_SLACK_S = 60.0
"""Ranks that wait for rank 0's batch wait this much longer than rank 0 waits for the manager."""


def build_run(config: Config, run_dir: Path, clock: Clock) -> Run:
    """Form the process groups, build the model, and connect the parts. All ranks call."""
    # The original's scheduler moves once per step.
    per_step = 1 if config.compat == "reference" else config.algo.updates_per_step
    state, actor = build_actor(config, clock, config.run.steps * per_step)
    plan = Plan.from_json((run_dir / "plan.json").read_text())
    # A group of its own: ranks wait here for a whole rollout, far longer than any collective of
    # the training step may take. gloo, because the bytes are on the host.
    waiting_s = config.rollout.step_timeout_s + SHARE_SLACK_S
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=waiting_s))
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    sync = _build_sync(config, plan, actor, state, run_dir, group)
    return Run(
        config=config,
        run_dir=run_dir,
        actor=actor,
        learner=PolicyLearner(config, actor, state, run_dir),
        rollouts=_build_rollouts(config, plan, state, run_dir, group, sync),
        sync=sync,
        clock=clock,
        log=RunLog(config, run_dir) if state.is_logging_rank else None,
        throughput=Throughput.of(config),
    )


def _build_rollouts(
    config: Config,
    plan: Plan,
    state: ParallelState,
    run_dir: Path,
    group: dist.ProcessGroup,
    sync: WeightSync,
) -> Rollouts:
    if config.rollout.replay:
        return ReplayRollouts(config.rollout.replay, partial(is_stop_agreed, run_dir, group))
    return ManagerRollouts(
        config.rollout,
        _manager_client(config, plan),
        _share_over(group),
        run_dir,
        is_first_rank=state.rank == 0,
        refit=sync.refit,
    )


def _manager_client(config: Config, plan: Plan) -> ManagerClient:
    return ManagerClient(
        plan.manager_url,
        os.environ["MATPO_RUN_TOKEN"],
        start_timeout_s=config.run.start_timeout_s,
        step_timeout_s=config.rollout.step_timeout_s,
    )


def _share_over(group: dist.ProcessGroup) -> Callable[[bytes | None], bytes]:
    return partial(share_bytes, group=group, device=torch.device("cpu"))


def _build_sync(
    config: Config,
    plan: Plan,
    actor: MegatronActor,
    state: ParallelState,
    run_dir: Path,
    group: dist.ProcessGroup,
) -> WeightSync:
    if config.rollout.replay:
        return NoEngines()
    key = os.environ["MATPO_ENGINE_KEY"]
    engines = [EngineClient(place.url, key) for place in plan.engines] if state.rank == 0 else []
    on_gpu = config.cluster.device == "cuda"
    hf = HfModelConfig.from_folder(config.model.path)
    shape = EngineShape(
        config.rollout.tensor,
        hf.num_kv_heads,
        torch.bfloat16 if on_gpu else torch.float32,
        on_cpu=not on_gpu,
    )
    sync = Transaction(
        actor.export,
        engines,
        _build_transport(config, plan, actor, run_dir),
        Verifier(config.weight_sync.verify, shape, on_gpu=on_gpu),
        timeout_s=config.weight_sync.timeout_s,
        start_timeout_s=config.run.start_timeout_s,
        recovery=Recovery(
            ManagerMembership(_manager_client(config, plan)),
            _share_over(group),
            config.weight_sync.retries,
            config.weight_sync.answer_timeout_s,
        ),
        pause_mode="in_place" if _keeps_cache(config) else "abort",
    )
    return PushOnce(sync) if config.weight_sync.transport == "none" else sync


def _build_transport(config: Config, plan: Plan, actor: MegatronActor, run_dir: Path) -> Transport:
    settings = config.weight_sync
    if settings.transport == "disk":
        folder = Path(settings.folder or run_dir / "weights")
        return DiskTransport(folder, actor.write_hf, flush_cache=not _keeps_cache(config))
    return BroadcastTransport(
        bucket_bytes=settings.bucket_mb << 20,
        ranks_per_engine=config.rollout.tensor,
        host=plan.trainer_host,
        port=plan.weight_sync_port,
        backend="nccl" if config.cluster.device == "cuda" else "gloo",
        flush_cache=not _keeps_cache(config),
    )


def _keeps_cache(config: Config) -> bool:
    """Whether generations go on from the cache of the weights before (`rollout.on_update`)."""
    return config.rollout.max_staleness > 0 and config.rollout.on_update == "in_place"
