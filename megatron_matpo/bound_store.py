"""A key-value store of torch that listens on one address; torch's own listens on all interfaces.

Such a store has no key, so where it listens is all that protects it.
"""

from __future__ import annotations

import socket
from datetime import timedelta

from torch import distributed as dist
from torch.distributed import distributed_c10d as c10d


def bound_store(
    host: str, port: int, world_size: int | None, *, is_master: bool, timeout: timedelta
) -> c10d.Store:
    """The store at `host:port`, served by this process if `is_master`.

    It is there once `world_size` processes have come; None: at once.

    Raises:
        OSError: this host does not have the address, or the port is taken.
        torch.distributed.DistStoreError: not everybody came inside `timeout`.
    """
    listening = None
    if is_master:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=1024).detach()
    # torch.distributed does not re-export the class by name, though it is public.
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        host,
        port,
        world_size,
        is_master,
        timeout,
        wait_for_workers=world_size is not None,
        master_listen_fd=listening,
    )
