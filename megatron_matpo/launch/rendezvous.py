"""How torchrun's agents meet: as torch's static rendezvous, on the run's own interface only."""

from __future__ import annotations

from torch.distributed.elastic.rendezvous import (
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from megatron_matpo.bound_store import bound_store

BACKEND = "matpo"
"""Name of it, for `LaunchConfig.rdzv_backend`."""


class BoundRendezvous(StaticTCPRendezvous):
    """Rank 0's store listens on the address that the others connect to, and on no other."""

    def get_backend(self) -> str:
        """Torch compares it with the name that was asked for."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """As torch's, which keeps a store that is there."""
        if self._store is None:
            self._store = bound_store(
                self.master_addr,
                self.master_port,
                self.world_size,
                is_master=self.rank == 0,
                timeout=self.timeout,
            )
        return super().next_rendezvous()


def register() -> None:
    """Make `BACKEND` known to torch; once per process."""
    rendezvous_handler_registry.register(BACKEND, _create)


def _create(params: RendezvousParameters) -> BoundRendezvous:
    host, port = params.endpoint.rsplit(":", 1)
    return BoundRendezvous(
        master_addr=host.strip("[]"),
        master_port=int(port),
        rank=int(params.config["rank"]),
        world_size=params.max_nodes,
        run_id=params.run_id,
        timeout=int(params.config["timeout"]),
    )
