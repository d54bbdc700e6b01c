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
    hosts_store: bool = True,
) -> dist.ProcessGroup:
    """Join as rank 0 the group that the engines join as ranks 1.. (blocks until all are there).

    Without `hosts_store` rank 0 meets them at a store that another process serves: the groups of
    several senders share the first one's, under their names.

    `matpo doctor` joins as the other ranks, too, where there are no engines yet.

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
    is_master = hosts_store and rank == 0
    store = bound_store(host, port, world_size, is_master=is_master, timeout=timeout)
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
