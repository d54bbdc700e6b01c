"""Who runs where: pure functions of the configuration, and of the addresses that nodes offer.

`place` says which role gets which node and GPU; `bind` adds addresses and ports. Every process of a
run reads the same `plan.json`, so that no address is ever guessed.

Rules. Nodes that train come first, each with equally many trainer ranks (the last may have fewer
if `cluster.trainer_nodes` is 0); ranks take a node's first GPUs. Engines fill what is left in the
order of the nodes, each on consecutive GPUs of one node; without GPUs they are dealt out over the
nodes that do not train, or over all if all train. Colocated engines begin again at node 0. Rollout
manager and evaluation are on node 0, which leads the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_matpo.config.root import Config

LEADER = 0
"""Node that opens the run's folder, makes the plan and names the first failure."""


@dataclass(frozen=True)
class EngineSlot:
    """Where one SGLang server runs."""

    index: int
    node: int
    gpus: tuple[int, ...]
    """Consecutive GPUs of the node; empty on a CPU."""


@dataclass(frozen=True)
class Placement:
    """Roles by node, before any address is known."""

    trainer_ranks_per_node: tuple[int, ...]
    """Entry n: number of trainer ranks on node n; they take the node's first GPUs."""
    engines: tuple[EngineSlot, ...]

    @property
    def num_nodes(self) -> int:
        """Nodes of the run."""
        return len(self.trainer_ranks_per_node)

    def num_ports(self, node: int) -> int:
        """Ports that the node's roles listen on: two for each engine.

        On the leader also those of the trainer's meeting, the manager and the weight sync.
        """
        own = sum(slot.node == node for slot in self.engines)
        return 2 * own + (3 if node == LEADER else 0)


@dataclass(frozen=True)
class Offer:
    """What a node brings to the plan."""

    host: str
    """Address that its servers bind to and others reach them at."""
    ports: tuple[int, ...]
    """At least `Placement.num_ports` free ones."""


@dataclass(frozen=True)
class EnginePlace:
    """One SGLang server."""

    index: int
    node: int
    host: str
    port: int
    internal_port: int
    """SGLang's own rendezvous port (its tensor-parallel group), so that two servers never meet."""
    gpus: tuple[int, ...]

    @property
    def url(self) -> str:
        """Base URL of the server."""
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True)
class Plan:
    """Roles, devices and ports of a run."""

    hosts: tuple[str, ...]
    """Address of every node."""
    trainer_port: int
    """Rendezvous of the trainer ranks (torchrun), on the leader."""
    trainer_ranks_per_node: tuple[int, ...]
    """Entry n: number of trainer ranks on node n; they take the node's first GPUs."""
    manager_port: int
    """On the leader."""
    weight_sync_port: int
    """Rendezvous of trainer rank 0 and the engines for weight pushes, on the leader."""
    engines: tuple[EnginePlace, ...]

    @property
    def num_nodes(self) -> int:
        """Nodes of the run."""
        return len(self.hosts)

    @property
    def trainer_host(self) -> str:
        """Address of trainer rank 0."""
        return self.hosts[LEADER]

    @property
    def num_trainer_nodes(self) -> int:
        """Nodes 0 .. n - 1 have trainer ranks."""
        return sum(ranks > 0 for ranks in self.trainer_ranks_per_node)

    @property
    def manager_url(self) -> str:
        """Base URL of the rollout manager."""
        return f"http://{self.manager_host}:{self.manager_port}"

    @property
    def manager_host(self) -> str:
        """Address of the rollout manager."""
        return self.hosts[LEADER]

    def to_json(self) -> str:
        """Serialise; `from_json` is the inverse."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        places: list[dict[str, Any]] = raw.pop("engines")
        for place in places:
            place["gpus"] = tuple(place["gpus"])
        engines = tuple(EnginePlace(**place) for place in places)
        for name in ("hosts", "trainer_ranks_per_node"):
            raw[name] = tuple(raw[name])
        return cls(engines=engines, **raw)


def place(config: Config, *, has_trainer: bool = True) -> Placement:
    """Place the roles of a validated run; without a trainer (`matpo eval`) engines get all GPUs."""
    ranks = _trainer_ranks(config) if has_trainer else (0,) * config.cluster.num_nodes
    slots = _dealt(config, ranks) if config.cluster.device == "cpu" else _packed(config, ranks)
    return Placement(ranks, tuple(slots))


def bind(placement: Placement, offers: Sequence[Offer]) -> Plan:
    """Give every listener an address. `offers` has one entry per node."""
    assert len(offers) == placement.num_nodes, "one offer for each node"
    ports = [iter(offer.ports) for offer in offers]
    trainer_port, manager_port, weight_sync_port = (next(ports[LEADER]) for _ in range(3))
    engines = tuple(
        EnginePlace(
            index=slot.index,
            node=slot.node,
            host=offers[slot.node].host,
            port=next(ports[slot.node]),
            internal_port=next(ports[slot.node]),
            gpus=slot.gpus,
        )
        for slot in placement.engines
    )
    return Plan(
        hosts=tuple(offer.host for offer in offers),
        trainer_port=trainer_port,
        trainer_ranks_per_node=placement.trainer_ranks_per_node,
        manager_port=manager_port,
        weight_sync_port=weight_sync_port,
        engines=engines,
    )


def num_ports(config: Config) -> int:
    """Most ports that any node of a training run needs."""
    placement = place(config)
    return max((placement.num_ports(node) for node in range(placement.num_nodes)), default=0)


def check_placement(config: Config, *, has_trainer: bool, has_engines: bool) -> Iterator[str]:
    """Violations: what does not fit on the machines. Values below 1 have lines of their own."""
    cluster, ranks = config.cluster, config.parallel.world_size if has_trainer else 0
    if cluster.trainer_nodes > cluster.num_nodes:
        yield (
            f"cluster.trainer_nodes={cluster.trainer_nodes}: must be at most cluster.num_nodes="
            f"{cluster.num_nodes}"
        )
        return
    if has_trainer and cluster.trainer_nodes > 0 and ranks % cluster.trainer_nodes:
        yield (
            f"cluster.trainer_nodes={cluster.trainer_nodes}: must divide the number of trainer "
            f"ranks (parallel.*), {ranks}"
        )
        return
    if cluster.device == "cuda":
        yield from _check_gpus(config, ranks, has_engines)


def _check_gpus(config: Config, ranks: int, has_engines: bool) -> Iterator[str]:
    cluster, tensor = config.cluster, config.rollout.tensor
    per_node = cluster.gpus_per_node
    if ranks > per_node * (cluster.trainer_nodes or cluster.num_nodes):
        where = "cluster.trainer_nodes" if cluster.trainer_nodes else "cluster.num_nodes"
        yield (
            f"{where}={cluster.trainer_nodes or cluster.num_nodes}: {ranks} trainer ranks "
            f"(parallel.*) need more GPUs than cluster.gpus_per_node={per_node} on each"
        )
        return
    if ranks > per_node and per_node % config.parallel.tensor:
        yield (
            f"parallel.tensor={config.parallel.tensor}: must divide cluster.gpus_per_node="
            f"{per_node}, so that no tensor-parallel group spans two nodes"
        )
    if not has_engines:
        return
    if tensor > per_node:
        yield (
            f"rollout.tensor={tensor}: must be at most cluster.gpus_per_node={per_node}; an engine "
            "does not span nodes"
        )
        return
    placed = len(place(config, has_trainer=ranks > 0).engines)
    if placed < config.rollout.num_servers:
        has_own = cluster.placement == "disaggregated" and ranks > 0
        left = f" beside {ranks} trainer ranks (parallel.*)" if has_own else ""
        yield (
            f"rollout.num_servers={config.rollout.num_servers}: only {placed} engines of "
            f"rollout.tensor={tensor} GPUs fit on cluster.num_nodes={cluster.num_nodes} x "
            f"cluster.gpus_per_node={per_node}{left}"
        )


def _trainer_ranks(config: Config) -> tuple[int, ...]:
    cluster, left = config.cluster, config.parallel.world_size
    if cluster.trainer_nodes > 0:
        per_node = left // cluster.trainer_nodes
    else:
        per_node = cluster.gpus_per_node if cluster.device == "cuda" else left
    ranks: list[int] = []
    for _ in range(cluster.num_nodes):
        ranks.append(min(per_node, left))
        left -= ranks[-1]
    return tuple(ranks)


def _dealt(config: Config, ranks: Sequence[int]) -> Iterator[EngineSlot]:
    """Without GPUs: nodes take turns."""
    idle = [node for node, count in enumerate(ranks) if count == 0]
    nodes = idle or list(range(len(ranks)))
    for index in range(config.rollout.num_servers):
        yield EngineSlot(index, nodes[index % len(nodes)], ())


def _packed(config: Config, ranks: Sequence[int]) -> Iterator[EngineSlot]:
    """On GPUs: as many engines as fit, at most `rollout.num_servers`."""
    cluster, size = config.cluster, config.rollout.tensor
    index = 0
    for node, taken in enumerate(ranks):
        first = 0 if cluster.placement == "colocated" else taken
        while index < config.rollout.num_servers and first + size <= cluster.gpus_per_node:
            yield EngineSlot(index, node, tuple(range(first, first + size)))
            index, first = index + 1, first + size
