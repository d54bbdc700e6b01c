"""The trainer's process groups: who am I, and which part of the model and of the batch is mine.

Rank order is Megatron's default, tensor fastest, then context, data, pipeline; so global rank 0 is
the first rank of every dimension.
"""

from __future__ import annotations

import datetime
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_matpo.config import Config
from megatron_matpo.config.precision import FP8_RECIPES
from megatron_matpo.errors import ConfigError, DeadlineError
from megatron_matpo.megatron import cpu_backend
from megatron_matpo.megatron.precision import resolve_precision

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ParallelState:
    """Position of this process in the layout; sizes are those of `parallel.*`."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    device: torch.device
    vp_size: int = 1
    """Chunks of layers per pipeline stage."""
    ep_rank: int = 0
    ep_size: int = 1
    """Ranks of a stage that share the experts; consecutive in the order tensor, context, data."""
    edp_rank: int = 0
    """Among the ranks that hold the same experts for different tokens."""
    fp8_rows: int = 1
    """What FP8 matrix products need the number of tokens of a rank to be a multiple of."""

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the output layer; the only stage that computes log-probs and losses."""
        return self.pp_rank == self.pp_size - 1

    @property
    def num_holders(self) -> int:
        """Ranks with the same parameters as this one: the size of `data_group`."""
        return self.dp_size * self.cp_size

    @property
    def is_first_holder(self) -> bool:
        """The first of them: it speaks for all, where one is enough."""
        return self.dp_rank == 0 and self.cp_rank == 0

    @property
    def sample_multiple(self) -> int:
        """Context parallelism cuts every sample into this many equal chunks."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def row_multiple(self) -> int:
        """What the length of a packed row is a multiple of.

        Context parallelism cuts it by cp, sequence parallelism that by tp, and what is left are the
        rows of FP8 products.
        """
        return math.lcm(self.sample_multiple, self.cp_size * self.tp_size * self.fp8_rows)

    @property
    def is_logging_rank(self) -> bool:
        """Global rank 0: logs, writes files, talks to the engines."""
        return self.rank == 0


def _check(config: Config, world_size: int) -> None:
    """Refuse what cannot run, before any process waits for another."""
    parallel = config.parallel
    if parallel.world_size != world_size:
        raise ConfigError(
            f"parallel.tensor x pipeline x context x data = {parallel.tensor} x "
            f"{parallel.pipeline} x {parallel.context} x {parallel.data} = {parallel.world_size}, "
            f"but {world_size} trainer ranks were started"
        )
    if parallel.stage_size % parallel.expert:
        raise ConfigError(
            f"parallel.expert={parallel.expert}: must divide tensor x context x data = "
            f"{parallel.stage_size}"
        )


def init_parallel(
    config: Config,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    master_addr: str = "",
    master_port: int = 0,
) -> ParallelState:
    """Join the trainer's process group and seed this rank. Collective: every trainer rank calls.

    What is not given is read from torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT). Waits at most `train.timeout_s` for the other ranks.

    Raises:
        ConfigError: the layout does not fit the number of ranks or the platform.
        DeadlineError: the ranks did not meet in time.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    master_addr = master_addr or os.environ.get("MASTER_ADDR", config.cluster.host)
    master_port = master_port or int(os.environ.get("MASTER_PORT", "29500"))
    _check(config, world_size)
    on_cpu = config.cluster.device == "cpu"
    if on_cpu:
        cpu_backend.install()
        if master_addr in _LOOPBACK and Path("/sys/class/net/lo").exists():
            # Otherwise gloo listens on whatever address the host name resolves to.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        device = cpu_backend.CPU
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=config.train.timeout_s)
    host = f"[{master_addr}]" if ":" in master_addr else master_addr
    try:
        dist.init_process_group(
            "gloo" if on_cpu else "nccl",
            init_method=f"tcp://{host}:{master_port}",
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=None if on_cpu else device,
        )
    except dist.DistStoreError as error:
        raise DeadlineError(
            f"the {world_size} trainer ranks did not meet at {master_addr}:{master_port} within "
            f"train.timeout_s={config.train.timeout_s:g}: {error}"
        ) from error
    return _model_parallel(config, device)


def _model_parallel(config: Config, device: torch.device) -> ParallelState:
    """Form Megatron's groups inside the default one, and seed."""
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel

    parallel = config.parallel
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        context_parallel_size=parallel.context,
        # Megatron makes a timedelta of it, which takes fractions.
        distributed_timeout_minutes=config.train.timeout_s / 60,  # type: ignore[arg-type]
        # Second groups on gloo serve checkpoint formats that are not used here.
        create_gloo_process_groups=False,
    )
    recipe = resolve_precision(config).fp8_recipe
    state = ParallelState(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        pp_size=mpu.get_pipeline_model_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        cp_rank=mpu.get_context_parallel_rank(),
        cp_size=mpu.get_context_parallel_world_size(),
        device=device,
        vp_size=parallel.virtual,
        ep_rank=mpu.get_expert_model_parallel_rank(),
        ep_size=mpu.get_expert_model_parallel_world_size(),
        edp_rank=mpu.get_expert_data_parallel_rank(),
        fp8_rows=FP8_RECIPES[recipe].token_multiple if recipe else 1,
    )
    # Stages differ, data-parallel replicas do not: they hold the same parameters.
    seed = config.run.seed + 100 * state.pp_rank
    random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return state


def _group(group: Any) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup), "init_parallel comes first"
    return group


def tensor_group() -> dist.ProcessGroup:
    """Ranks that hold parts of the same layers for the same micro-batches."""
    from megatron.core import parallel_state as mpu

    return _group(mpu.get_tensor_model_parallel_group())


def pipeline_group() -> dist.ProcessGroup:
    """Ranks that hold consecutive layers for the same micro-batches, first stage first."""
    from megatron.core import parallel_state as mpu

    return _group(mpu.get_pipeline_model_parallel_group())


def context_group() -> dist.ProcessGroup:
    """Ranks that hold the same parameters for different tokens of the same micro-batches."""
    from megatron.core import parallel_state as mpu

    return _group(mpu.get_context_parallel_group())


def model_group() -> dist.ProcessGroup:
    """Ranks that hold one replica of the model together: stage by stage, each in tensor order."""
    from megatron.core import parallel_state as mpu

    return _group(mpu.get_model_parallel_group())


def data_group() -> dist.ProcessGroup:
    """Ranks that hold the same parameters for different micro-batches, or other tokens of them."""
    from megatron.core import parallel_state as mpu

    return _group(mpu.get_data_parallel_group(with_context_parallel=True))


def expert_group() -> dist.ProcessGroup:
    """Ranks that share the experts of the same layers."""
    from megatron.core import parallel_state as mpu

    return _group(mpu.get_expert_model_parallel_group())


def expert_data_group() -> dist.ProcessGroup:
    """Ranks that hold the same experts for different tokens."""
    from megatron.core import parallel_state as mpu

    return _group(mpu.get_expert_data_parallel_group())


def destroy_parallel() -> None:
    """Leave all process groups. Safe to call twice, or without `init_parallel`."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state as mpu
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    mpu.destroy_model_parallel()
    dist.destroy_process_group()
    # It remembers the last 32 results together with the modules that gave them, these hold their
    # process groups, and a gloo group keeps its threads until nobody holds it.
    RotaryEmbedding.forward.cache_clear()
