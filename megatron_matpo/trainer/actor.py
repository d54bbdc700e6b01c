"""The trainer's model and process groups, as both training commands need them."""

from __future__ import annotations

from dataclasses import replace

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.parallel import ParallelState, init_parallel
from megatron_matpo.megatron.precision import describe
from megatron_matpo.trainer.clock import Clock


def build_actor(
    config: Config, clock: Clock, planned_updates: int
) -> tuple[ParallelState, MegatronActor]:
    """Form the process groups and build the model with its optimizer. All ranks call.

    `planned_updates` is the most that the run can make, for a schedule that ends with it.
    """
    config = replace(config, optim=config.optim.planned(planned_updates))
    clock.enter("init")
    state = init_parallel(config)
    clock.enter("build model")
    if state.is_logging_rank:
        print(describe(config), flush=True)
    return state, MegatronActor(config, HfModelConfig.from_folder(config.model.path), state)
