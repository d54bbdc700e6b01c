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
from megatron_matpo.megatron.parallel import ParallelState
from megatron_matpo.weight_sync.broadcast import BroadcastTransport, Follow, only_export
from megatron_matpo.weight_sync.disk import DiskTransport
from megatron_matpo.weight_sync.ipc import IpcTransport, TrainerRanks
from megatron_matpo.weight_sync.remote_stages import RemoteStage, StageFollower
from megatron_matpo.weight_sync.shared_buffers import DeviceBuffer, HostBuffer
from megatron_matpo.weight_sync.stages import LocalStage
from megatron_matpo.weight_sync.transport import Export, Transport
from megatron_matpo.weight_sync.verify import Verifier


def build_transport(
    config: Config,
    plan: Plan,
    actor: Callable[[], MegatronActor],
    state: ParallelState,
    verifier: Verifier,
    run_dir: Path,
) -> tuple[Transport, Export]:
    """By `weight_sync.transport`, and what it sends. All ranks call; `actor` is asked later."""
    settings = config.weight_sync
    on_gpu = config.cluster.device == "cuda"
    bucket_bytes = settings.bucket_mb << 20
    flush_cache = not keeps_cache(config)

    def export_to_first() -> Iterator[tuple[str, Tensor]]:
        return actor().lend(by_stage=False)

    def export_by_stage() -> Iterator[tuple[str, Tensor]]:
        return actor().lend(by_stage=True)

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
    return _broadcast(config, plan, state, verifier), export_by_stage


def _broadcast(
    config: Config, plan: Plan, state: ParallelState, verifier: Verifier
) -> BroadcastTransport:
    settings = config.weight_sync
    on_gpu = config.cluster.device == "cuda"
    bucket_bytes = settings.bucket_mb << 20
    others, follow = form_senders(
        state,
        verifier,
        lambda: LocalStage(state.rank, bucket_bytes, flat=on_gpu),
        group_timeout_s=config.train.timeout_s,
        timeout_s=settings.timeout_s,
    )
    return BroadcastTransport(
        bucket_bytes=bucket_bytes,
        ranks_per_engine=config.rollout.tensor,
        host=plan.trainer_host,
        port=plan.weight_sync_port,
        backend="nccl" if on_gpu else "gloo",
        others=others,
        follow=follow,
        flush_cache=not keeps_cache(config),
    )


def form_senders(
    state: ParallelState,
    verifier: Verifier,
    make_stage: Callable[[], LocalStage],
    *,
    group_timeout_s: float,
    timeout_s: float,
) -> tuple[list[RemoteStage], Follow]:
    """The senders of later pipeline stages for rank 0, and the part of every other rank.

    All ranks call; `make_stage` is called on those that send as they are told. Rank order has the
    pipeline outermost, so stages begin at equal distances.
    """
    if state.pp_size == 1:
        return [], only_export
    ranks = list(range(0, state.world_size, state.world_size // state.pp_size))
    # gloo, because the messages are on the host; a sender waits here while engines are paused and
    # while other stages send.
    group = dist.new_group(ranks, backend="gloo", timeout=timedelta(seconds=group_timeout_s))
    if state.rank not in ranks:
        return [], only_export
    assert isinstance(group, dist.ProcessGroup), "this rank is a member"
    if state.rank == 0:
        return [RemoteStage(rank, group, verifier) for rank in ranks[1:]], only_export
    return [], StageFollower(make_stage(), group, verifier, timeout_s)


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
