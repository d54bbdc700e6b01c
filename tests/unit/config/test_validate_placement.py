"""What a run with shared devices or shared memory needs, and how the errors say it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.config.train import ParallelConfig, WeightSyncConfig
from megatron_matpo.config.validate_placement import check_shared

GPUS = ClusterConfig(num_nodes=2, gpus_per_node=8, placement="colocated")


def on_gpus(transport: str = "auto", *, data: int = 4, servers: int = 8, **rollout: int) -> Config:
    return replace(
        Config(),
        cluster=GPUS,
        parallel=ParallelConfig(tensor=4, data=data),
        rollout=RolloutConfig(num_servers=servers, tensor=2, **rollout),
        weight_sync=WeightSyncConfig(transport=transport),
    )


def test_the_transport_follows_from_the_placement() -> None:
    assert Config().transport == "broadcast"
    assert on_gpus().transport == "ipc"
    assert on_gpus("disk").transport == "disk"


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        replace(Config(), cluster=ClusterConfig(placement="colocated")),
        replace(Config(), weight_sync=WeightSyncConfig(transport="ipc")),
        on_gpus(),
        on_gpus("disk"),
        # The loading from a folder does not care which rank is where.
        on_gpus("disk", data=2),
        on_gpus(data=2, servers=4),
    ],
)
def test_what_fits_together(config: Config) -> None:
    assert list(check_shared(config)) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (on_gpus("broadcast"), "weight_sync.transport=broadcast: NCCL refuses two processes"),
        (on_gpus("none"), "weight_sync.transport=none: colocated engines lose their weights"),
        (
            on_gpus(data=2),
            "cluster.placement=colocated: engine 4 is on GPUs 0 to 1 of node 1, which has 0",
        ),
        (
            replace(on_gpus("ipc"), cluster=replace(GPUS, placement="disaggregated")),
            "weight_sync.transport=ipc: on GPUs an engine opens memory of its own device",
        ),
        (
            replace(Config(), cluster=ClusterConfig(num_nodes=2, placement="colocated")),
            "weight_sync.transport=ipc: on CPUs trainer rank 0 and all engines must be on one",
        ),
    ],
)
def test_what_does_not(config: Config, message: str) -> None:
    (line,) = check_shared(config)
    assert line.startswith(message)
