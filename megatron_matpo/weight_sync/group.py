"""A process group that spans trainer rank 0 and the engines, beside the trainer's own world."""

from __future__ import annotations

from datetime import timedelta

from torch import distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_matpo.bound_store import bound_store


def form_group(
    *,
    host: str,
    port: int,
    world_size: int,
    backend: str,
    name: str,
    timeout_s: float,
    rank: int = 0,
    store: c10d.Store | None = None,
) -> dist.ProcessGroup:
    """Join as rank 0 the group that the engines join as ranks 1.. (blocks until all are there).

    `matpo doctor` joins as the other ranks, too, where there are no engines yet. `store` is one of
    `open_store`, for whoever forms several groups one after another at the same address.

    `torch.distributed.new_group` cannot do this, because its members must share one world. The
    engines form their side with `tcp://host:port`, a store prefixed by the group's name and
    torch's own helper; the same steps are taken here so that both sides meet on the same keys.
    On GPUs both sides must agree on NCCL_CUMEM_ENABLE.

    Raises:
        OSError: this host does not have the address, or the port is taken.
        torch.distributed.DistStoreError: not everybody came inside `timeout_s`.
    """
    timeout = timedelta(seconds=timeout_s)
    # Not torch's tcp:// rendezvous: under torchrun that makes rank 0 a client of a store which
    # torchrun's agent would have to serve.
    if store is None:
        store = bound_store(host, port, world_size, is_master=rank == 0, timeout=timeout)
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=c10d.GroupName(name),
        timeout=timeout,
    )
    # Collectives address ranks of the group itself: there is no enclosing world to translate from.
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    assert isinstance(group, dist.ProcessGroup), "every rank that joins is a member"
    return group


def open_store(host: str, port: int, timeout_s: float, *, is_master: bool = True) -> c10d.Store:
    """Serve, or find, the keys of all groups that senders will form; names keep them apart.

    It waits for nobody: a group is complete when all of it have found each other's keys.
    """
    timeout = timedelta(seconds=timeout_s)
    return bound_store(host, port, None, is_master=is_master, timeout=timeout)


def leave_group(group: dist.ProcessGroup) -> None:
    """Forget a group that may be broken; whoever waits in it for this rank gets an error."""
    group.abort()
    dist.destroy_process_group(group)
