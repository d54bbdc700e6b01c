"""Which transport a run uses, and which export feeds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

from torch import Tensor
from torch import distributed as dist

from megatron_matpo.config import Config
from megatron_matpo.config.plan import Plan
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.weight_sync.broadcast import BroadcastTransport
from megatron_matpo.weight_sync.disk import DiskTransport
from megatron_matpo.weight_sync.ipc import IpcTransport, TrainerRanks
from megatron_matpo.weight_sync.shared_buffers import DeviceBuffer, HostBuffer
from megatron_matpo.weight_sync.transaction import Export, Transport


def build_transport(
    config: Config, plan: Plan, actor: Callable[[], MegatronActor], run_dir: Path
) -> tuple[Transport, Export]:
    """By `weight_sync.transport`, and what it sends. All ranks call; `actor` is asked later."""
    settings = config.weight_sync
    on_gpu = config.cluster.device == "cuda"
    bucket_bytes = settings.bucket_mb << 20
    flush_cache = not keeps_cache(config)

    def export_to_first() -> Iterator[tuple[str, Tensor]]:
        return actor().export()

    def export_to_all() -> Iterator[tuple[str, Tensor]]:
        return actor().export_everywhere()

    if config.transport == "disk":
        folder = Path(settings.folder or run_dir / "weights")

        def write(path: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
            actor().write_hf(path, tensors)

        return DiskTransport(folder, write, flush_cache=flush_cache), export_to_first
    if config.transport == "ipc" and on_gpu:
        timeout = timedelta(seconds=config.train.timeout_s)
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup), "every rank is a member"
        ipc = IpcTransport(
            bucket_bytes=bucket_bytes,
            writers=writers_on_devices(plan),
            make_buffer=DeviceBuffer,
            ranks=TrainerRanks(group),
            keeps_buffers=False,
            flush_cache=flush_cache,
        )
        return ipc, export_to_all
    if config.transport == "ipc":
        # Whatever its rank, an engine on this machine can open what rank 0 writes.
        writers = {place.url: (0,) * config.rollout.tensor for place in plan.engines}
        ipc = IpcTransport(
            bucket_bytes=bucket_bytes,
            writers=writers,
            make_buffer=HostBuffer,
            flush_cache=flush_cache,
        )
        return ipc, export_to_first
    broadcast = BroadcastTransport(
        bucket_bytes=bucket_bytes,
        ranks_per_engine=config.rollout.tensor,
        host=plan.trainer_host,
        port=plan.weight_sync_port,
        backend="nccl" if on_gpu else "gloo",
        flush_cache=flush_cache,
    )
    return broadcast, export_to_first


def keeps_cache(config: Config) -> bool:
    """Whether generations go on from the cache of the weights before (`rollout.on_update`)."""
    return config.rollout.max_staleness > 0 and config.rollout.on_update == "in_place"


def writers_on_devices(plan: Plan) -> dict[str, tuple[int, ...]]:
    """By engine (URL), the trainer ranks on its GPUs: ranks take the first GPUs of their nodes."""
    first_ranks = [sum(plan.trainer_ranks_per_node[:node]) for node in range(plan.num_nodes)]
    return {
        place.url: tuple(first_ranks[place.node] + gpu for gpu in place.gpus)
        for place in plan.engines
    }
