"""Who runs where: a pure function of the configuration and a list of free ports.

Every process of a run reads the same `plan.json`, so that no address is ever guessed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from megatron_matpo.config.root import Config


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

    num_nodes: int
    trainer_host: str
    trainer_port: int
    """Rendezvous of the trainer ranks (torchrun)."""
    trainer_ranks_per_node: tuple[int, ...]
    """Entry n: number of trainer ranks on node n; they take the node's first GPUs."""
    manager_host: str
    manager_port: int
    weight_sync_port: int
    """Rendezvous of trainer rank 0 and the engines for weight pushes."""
    engines: tuple[EnginePlace, ...]

    @property
    def manager_url(self) -> str:
        """Base URL of the rollout manager."""
        return f"http://{self.manager_host}:{self.manager_port}"

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
        raw["trainer_ranks_per_node"] = tuple(raw["trainer_ranks_per_node"])
        return cls(engines=engines, **raw)


def num_ports(config: Config) -> int:
    """Number of ports a run on one node needs: trainer, manager, weight sync, two per engine."""
    return 3 + 2 * config.rollout.num_servers


def make_plan(config: Config, ports: list[int], *, has_trainer: bool = True) -> Plan:
    """Place the roles of a one-node run.

    Args:
        config: a validated configuration.
        ports: `num_ports(config)` free ports of the node.
        has_trainer: False gives the engines all GPUs (`matpo eval`).
    """
    assert len(ports) >= num_ports(config), "one port for each listener"
    host = config.cluster.host
    num_ranks = config.parallel.world_size if has_trainer else 0
    first_gpu = num_ranks if config.cluster.device == "cuda" else 0
    per_engine = config.rollout.tensor if config.cluster.device == "cuda" else 0
    engines = tuple(
        EnginePlace(
            index=i,
            node=0,
            host=host,
            port=ports[3 + 2 * i],
            internal_port=ports[4 + 2 * i],
            gpus=tuple(range(first_gpu + i * per_engine, first_gpu + (i + 1) * per_engine)),
        )
        for i in range(config.rollout.num_servers)
    )
    return Plan(
        num_nodes=config.cluster.num_nodes,
        trainer_host=host,
        trainer_port=ports[0],
        trainer_ranks_per_node=(num_ranks,),
        manager_host=host,
        manager_port=ports[1],
        weight_sync_port=ports[2],
        engines=engines,
    )
