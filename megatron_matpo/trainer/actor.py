"""The trainer's process groups and model, as both training commands need them. All ranks call."""

from __future__ import annotations

from dataclasses import replace

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.parallel import ParallelState, init_parallel
from megatron_matpo.megatron.precision import describe
from megatron_matpo.trainer.clock import Clock


def form_groups(config: Config, clock: Clock) -> ParallelState:
    """Meet the other ranks. Takes little of the device's memory."""
    clock.enter("init")
    return init_parallel(config)


def build_actor(
    config: Config, clock: Clock, state: ParallelState, planned_updates: int
) -> MegatronActor:
    """Build the model with its optimizer.

    `planned_updates` is the most that the run can make, for a schedule that ends with it.
    """
    config = replace(config, optim=config.optim.planned(planned_updates))
    clock.enter("build model")
    if state.is_logging_rank:
        print(describe(config), flush=True)
    return MegatronActor(config, HfModelConfig.from_folder(config.model.path), state)
