"""The trainer's model and process groups, as both training commands need them."""

from __future__ import annotations

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.parallel import ParallelState, init_parallel
from megatron_matpo.megatron.precision import describe
from megatron_matpo.trainer.clock import Clock


def build_actor(config: Config, clock: Clock) -> tuple[ParallelState, MegatronActor]:
    """Form the process groups and build the model with its optimizer. All ranks call."""
    clock.enter("init")
    state = init_parallel(config)
    clock.enter("build model")
    if state.is_logging_rank:
        print(describe(config), flush=True)
    return state, MegatronActor(config, HfModelConfig.from_folder(config.model.path), state)
