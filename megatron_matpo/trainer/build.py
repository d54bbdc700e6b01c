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
from megatron_matpo.trainer.actor import build_actor, form_groups
from megatron_matpo.trainer.clock import Clock
from megatron_matpo.trainer.device_memory import device_memory
from megatron_matpo.trainer.learner import PolicyLearner
from megatron_matpo.trainer.membership import ManagerMembership
from megatron_matpo.trainer.placement import Apart, InTurns
from megatron_matpo.trainer.rollouts import ManagerRollouts, ReplayRollouts, Rollouts, share_bytes
from megatron_matpo.trainer.run import Run, RunLog, WeightSync
from megatron_matpo.trainer.stopping import is_stop_agreed
from megatron_matpo.trainer.throughput import Throughput
from megatron_matpo.trainer.transports import build_transport, keeps_cache, writers_on_devices
from megatron_matpo.weight_sync.layout import EngineShape
from megatron_matpo.weight_sync.membership import Recovery
from megatron_matpo.weight_sync.transaction import Transaction
from megatron_matpo.weight_sync.unpushed import NoEngines, PushOnce
from megatron_matpo.weight_sync.verify import Verifier

SHARE_SLACK_S = 60.0
"""Ranks that wait for rank 0's batch wait this much longer than rank 0 waits for the manager."""


def build_run(config: Config, run_dir: Path, clock: Clock) -> Run:
    """Form the process groups, build the model, and connect the parts. All ranks call."""
    state = form_groups(config, clock)
    plan = Plan.from_json((run_dir / "plan.json").read_text())
    # A group of its own: ranks wait here for a whole rollout, far longer than any collective of
    # the training step may take. gloo, because the bytes are on the host.
    waiting_s = config.rollout.step_timeout_s + SHARE_SLACK_S
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=waiting_s))
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    # The actor comes last: colocated engines give their memory back before its model takes it.
    sync = build_sync(config, plan, lambda: actor, state, run_dir, group)
    rollouts = _build_rollouts(config, plan, state, run_dir, group, sync)
    placement = Apart()
    if config.cluster.placement == "colocated" and isinstance(sync, Transaction):
        shared = {rank for ranks in writers_on_devices(plan).values() for rank in ranks}
        memory = device_memory(config)
        has_engine = state.rank in shared
        placement = InTurns(sync, _meeting(config), memory, clock, has_engine=has_engine)
        clock.enter("take memory")
        rollouts.connect()
        sync.connect()
        placement.start()
    # The original's scheduler moves once per step.
    per_step = 1 if config.compat == "reference" else config.algo.updates_per_step
    actor = build_actor(config, clock, state, config.run.steps * per_step)
    if isinstance(placement, InTurns):
        placement.own(actor)
    return Run(
        config=config,
        run_dir=run_dir,
        actor=actor,
        learner=PolicyLearner(config, actor, state, run_dir),
        rollouts=rollouts,
        sync=sync,
        placement=placement,
        clock=clock,
        log=RunLog(config, run_dir) if state.is_logging_rank else None,
        throughput=Throughput.of(config),
    )


def _meeting(config: Config) -> Callable[[], None]:
    """A barrier of all ranks, over gloo: it takes nothing of a GPU. All ranks call."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.train.timeout_s))
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"

    def meet() -> None:
        dist.barrier(group=group)

    return meet


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


def build_sync(
    config: Config,
    plan: Plan,
    actor: Callable[[], MegatronActor],
    state: ParallelState,
    run_dir: Path,
    group: dist.ProcessGroup,
) -> WeightSync:
    """What keeps the engines on the weights of `actor()`, which is asked for at the first push."""
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
    verifier = Verifier(config.weight_sync.verify, shape, on_gpu=on_gpu)
    transport, export = build_transport(config, plan, actor, state, verifier, run_dir)
    sync = Transaction(
        export,
        engines,
        transport,
        verifier,
        timeout_s=config.weight_sync.timeout_s,
        start_timeout_s=config.run.start_timeout_s,
        pause_mode="in_place" if keeps_cache(config) else "abort",
        recovery=Recovery(
            ManagerMembership(_manager_client(config, plan)),
            _share_over(group),
            _retries(config),
            config.weight_sync.answer_timeout_s,
        ),
    )
    return PushOnce(sync) if config.transport == "none" else sync


def _retries(config: Config) -> int:
    """How often a push may be tried again; not by colocated engines, whose state is one for all."""
    return 0 if config.cluster.placement == "colocated" else config.weight_sync.retries
