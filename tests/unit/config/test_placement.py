"""Who runs where: by hand for layouts that people use, and as properties up to 128 nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_matpo.config import Config
from megatron_matpo.config.plan import Offer, Plan, bind, check_placement, num_ports, place
from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.config.train import ParallelConfig


def make(parallel: ParallelConfig, servers: int, tensor: int, **cluster) -> Config:
    return replace(
        Config(),
        cluster=ClusterConfig(interface="ib0", **cluster),
        parallel=parallel,
        rollout=RolloutConfig(num_servers=servers, tensor=tensor),
    )


def problems(config: Config, *, has_trainer: bool = True, has_engines: bool = True) -> list[str]:
    return list(check_placement(config, has_trainer=has_trainer, has_engines=has_engines))


def test_sixteen_nodes_half_for_training_half_for_engines():
    config = make(ParallelConfig(tensor=4, data=16), 32, 2, num_nodes=16, gpus_per_node=8)
    placement = place(config)
    assert placement.trainer_ranks_per_node == (8,) * 8 + (0,) * 8
    assert [slot.node for slot in placement.engines] == [8 + i // 4 for i in range(32)]
    assert [slot.gpus for slot in placement.engines[:4]] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [placement.num_ports(node) for node in (0, 1, 8)] == [3, 0, 8]
    assert problems(config) == []


def test_engines_also_use_what_the_trainer_leaves_of_a_node():
    config = make(ParallelConfig(tensor=2, data=6), 10, 2, num_nodes=4, gpus_per_node=8)
    placement = place(config)
    assert placement.trainer_ranks_per_node == (8, 4, 0, 0)
    assert [(slot.node, slot.gpus) for slot in placement.engines[:3]] == [
        (1, (4, 5)),
        (1, (6, 7)),
        (2, (0, 1)),
    ]
    assert problems(config) == []
    (line,) = problems(replace(config, rollout=RolloutConfig(num_servers=11, tensor=2)))
    assert line == (
        "rollout.num_servers=11: only 10 engines of rollout.tensor=2 GPUs fit on "
        "cluster.num_nodes=4 x cluster.gpus_per_node=8 beside 12 trainer ranks (parallel.*)"
    )


def test_colocated_engines_share_the_trainers_gpus():
    config = make(
        ParallelConfig(tensor=4, data=4), 8, 2, num_nodes=2, gpus_per_node=8, placement="colocated"
    )
    placement = place(config)
    assert placement.trainer_ranks_per_node == (8, 8)
    assert [slot.node for slot in placement.engines] == [0] * 4 + [1] * 4
    assert problems(config) == []


def test_an_evaluation_gives_the_engines_every_gpu():
    config = make(ParallelConfig(tensor=4, data=4), 16, 1, num_nodes=2, gpus_per_node=8)
    assert place(config, has_trainer=False).trainer_ranks_per_node == (0, 0)
    assert len(place(config, has_trainer=False).engines) == 16
    assert problems(config, has_trainer=False) == []


def test_without_gpus_one_node_trains_and_the_others_serve():
    config = make(ParallelConfig(tensor=2), 3, 1, num_nodes=3)
    placement = place(config)
    assert placement.trainer_ranks_per_node == (2, 0, 0)
    assert [slot.node for slot in placement.engines] == [1, 2, 1]


def test_trainer_nodes_spreads_the_ranks():
    config = make(ParallelConfig(data=2), 2, 1, num_nodes=2, trainer_nodes=2)
    placement = place(config)
    assert placement.trainer_ranks_per_node == (1, 1)
    assert [slot.node for slot in placement.engines] == [0, 1], "all nodes train, so all serve too"
    gpus = make(ParallelConfig(data=8), 4, 2, num_nodes=4, gpus_per_node=4, trainer_nodes=4)
    assert place(gpus).trainer_ranks_per_node == (2, 2, 2, 2)
    assert [slot.gpus for slot in place(gpus).engines] == [(2, 3)] * 4


@pytest.mark.parametrize(
    ("config", "begins"),
    [
        (
            make(ParallelConfig(data=3), 1, 1, num_nodes=4, trainer_nodes=2),
            "cluster.trainer_nodes=2: must divide the number of trainer ranks (parallel.*), 3",
        ),
        (
            make(ParallelConfig(data=3), 1, 1, num_nodes=2, trainer_nodes=3),
            "cluster.trainer_nodes=3: must be at most cluster.num_nodes=2",
        ),
        (
            make(ParallelConfig(data=17), 1, 1, num_nodes=2, gpus_per_node=8),
            "cluster.num_nodes=2: 17 trainer ranks (parallel.*) need more GPUs than",
        ),
        (
            make(ParallelConfig(data=8), 1, 1, num_nodes=2, gpus_per_node=4, trainer_nodes=1),
            "cluster.trainer_nodes=1: 8 trainer ranks (parallel.*) need more GPUs than",
        ),
        (
            make(ParallelConfig(tensor=3, data=4), 1, 1, num_nodes=3, gpus_per_node=8),
            "parallel.tensor=3: must divide cluster.gpus_per_node=8, so that no tensor-parallel",
        ),
        (
            make(ParallelConfig(data=8), 1, 16, num_nodes=4, gpus_per_node=8),
            "rollout.tensor=16: must be at most cluster.gpus_per_node=8; an engine does not span",
        ),
    ],
)
def test_what_does_not_fit_is_refused(config, begins):
    (line,) = problems(config)
    assert line.startswith(begins)


@settings(max_examples=60, deadline=None)
@given(
    num_nodes=st.integers(1, 128),
    per_node=st.sampled_from([0, 1, 4, 8]),
    tensor=st.sampled_from([1, 2, 4, 8]),
    data=st.integers(1, 128),
    engine=st.sampled_from([1, 2, 4, 8]),
    servers=st.integers(1, 256),
    colocated=st.booleans(),
)
def test_a_plan_that_is_accepted_shares_nothing(
    num_nodes, per_node, tensor, data, engine, servers, colocated
):
    config = make(
        ParallelConfig(tensor=tensor, data=data),
        servers,
        engine,
        num_nodes=num_nodes,
        gpus_per_node=per_node,
        placement="colocated" if colocated else "disaggregated",
    )
    if problems(config):
        return
    placement = place(config)
    assert sum(placement.trainer_ranks_per_node) == tensor * data
    assert [slot.index for slot in placement.engines] == list(range(servers))
    taken: set[tuple[int, int]] = set()
    for node, ranks in enumerate(placement.trainer_ranks_per_node):
        assert per_node == 0 or ranks <= per_node
        if not colocated:
            taken |= {(node, gpu) for gpu in range(ranks)}
    for slot in placement.engines:
        assert len(slot.gpus) == (engine if per_node else 0)
        own = {(slot.node, gpu) for gpu in slot.gpus}
        assert not own & taken
        assert all(gpu < per_node for _, gpu in own)
        taken |= own
    # Ports: every listener has one of its own node's, and none is used twice.
    offers = [
        Offer(f"10.0.0.{node}", tuple(range(20_000, 20_000 + placement.num_ports(node))))
        for node in range(num_nodes)
    ]
    plan = bind(placement, offers)
    used = [("10.0.0.0", port) for port in (plan.trainer_port, plan.manager_port)]
    used.append(("10.0.0.0", plan.weight_sync_port))
    for engine_place in plan.engines:
        assert engine_place.host == f"10.0.0.{engine_place.node}"
        used += [(engine_place.host, p) for p in (engine_place.port, engine_place.internal_port)]
    assert len(set(used)) == len(used) == sum(len(offer.ports) for offer in offers)
    assert max(len(offer.ports) for offer in offers) == num_ports(config)
    assert Plan.from_json(plan.to_json()) == plan


def test_a_thousand_gpus():
    config = make(ParallelConfig(tensor=8, data=64), 256, 2, num_nodes=128, gpus_per_node=8)
    placement = place(config)
    assert placement.trainer_ranks_per_node == (8,) * 64 + (0,) * 64
    assert {slot.node for slot in placement.engines} == set(range(64, 128))
    assert problems(config) == []
