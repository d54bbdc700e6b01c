"""Which node a process is on, told from Slurm's variables or our own."""

from __future__ import annotations

import pytest

from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.launch import nodes
from megatron_matpo.launch.nodes import (
    Node,
    address_of,
    check_nodes,
    default_interface,
    interface_of,
    network_variables,
    this_node,
)

# Of `srun -N2 --ntasks-per-node=1` inside a job that was requeued once (Slurm 22.05).
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_RESTART_COUNT": "1",
    "SLURMD_NODENAME": "n2",
}
OWN = {"MATPO_NODE_RANK": "3", "MATPO_NUM_NODES": "4", "MATPO_LAUNCH_ID": "tuesday.1"}


def test_slurm_says_it():
    assert this_node(SLURM) == Node(1, 2, "17.0.1", "n2")
    assert not this_node(SLURM).is_leader


def test_two_starts_of_one_job_never_share_an_id():
    first = {**SLURM}
    del first["SLURM_RESTART_COUNT"]
    ids = {
        this_node(environ).launch_id for environ in (SLURM, first, {**SLURM, "SLURM_STEP_ID": "1"})
    }
    assert len(ids) == 3


def test_a_batch_script_without_srun_is_one_node():
    environ = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"}
    assert this_node(environ).count == 1
    assert this_node({}).count == 1


def test_our_own_variables_go_first():
    node = this_node({**SLURM, **OWN})
    assert (node.index, node.count, node.launch_id) == (3, 4, "tuesday.1")


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "16"}, "16 tasks on 2 nodes.*--ntasks-per-node=1"),
        ({"MATPO_NODE_RANK": "0"}, "without MATPO_NUM_NODES, MATPO_LAUNCH_ID"),
        ({**OWN, "MATPO_NODE_RANK": "4"}, "must be less than MATPO_NUM_NODES=4"),
        ({**OWN, "MATPO_NUM_NODES": "many"}, "MATPO_NUM_NODES=many: expected a whole number"),
        ({**OWN, "MATPO_LAUNCH_ID": "../x"}, "letters, digits"),
    ],
)
def test_nonsense_is_refused(environ, text):
    with pytest.raises(ConfigError, match=text):
        this_node(environ)


def test_the_recipe_and_the_start_agree_on_the_number_of_nodes():
    check_nodes(Node(0, 2, "x", "n1"), ClusterConfig(num_nodes=2))
    with pytest.raises(ConfigError, match=r"cluster\.num_nodes=2: .* on one node; .*srun"):
        check_nodes(Node(0, 1, "x", "n1"), ClusterConfig(num_nodes=2))
    with pytest.raises(ConfigError, match=r"cluster\.num_nodes=1: .* on 4 nodes"):
        check_nodes(Node(0, 4, "x", "n1"), ClusterConfig())


def test_a_network_that_the_environment_names_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "_ROUTES", tmp_path / "route")
    (tmp_path / "route").write_text(ROUTES)
    both = {"NCCL_SOCKET_IFNAME": "bond0", "GLOO_SOCKET_IFNAME": "bond0"}
    environ = {"NCCL_SOCKET_IFNAME": "^docker0,lo"}
    several = ClusterConfig(num_nodes=2)
    assert network_variables(several, {}) == both
    assert network_variables(several, environ) == {"GLOO_SOCKET_IFNAME": "bond0"}
    assert network_variables(ClusterConfig(), environ) == {}
    named = ClusterConfig(num_nodes=2, interface="ib0")
    assert network_variables(named, environ) == dict.fromkeys(both, "ib0")


def test_the_interface_gives_the_address():
    assert address_of(ClusterConfig(interface="lo", host="192.0.2.1")) == "127.0.0.1"
    assert address_of(ClusterConfig(host="192.0.2.1")) == "192.0.2.1"
    with pytest.raises(ConfigError, match=r"cluster\.interface=ib7: .* its interfaces are .*lo"):
        address_of(ClusterConfig(interface="ib7"))


ROUTES = """\
Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
ib0	0000A8C0	00000000	0001	0	0	0	00FFFFFF	0	0	0
eno1	00000000	0100000A	0003	0	0	200	00000000	0	0	0
bond0	00000000	0200000A	0003	0	0	100	00000000	0	0	0
"""


def test_several_nodes_meet_on_the_default_route_unless_told_otherwise(monkeypatch, tmp_path):
    assert default_interface(ROUTES) == "bond0"
    assert default_interface(ROUTES.splitlines()[0]) == ""
    assert interface_of(ClusterConfig()) == "", "one node stays on loopback"
    routes = tmp_path / "routes"
    monkeypatch.setattr("megatron_matpo.launch.nodes._ROUTES", routes)
    routes.write_text(ROUTES)
    assert interface_of(ClusterConfig(num_nodes=2)) == "bond0"
    assert interface_of(ClusterConfig(num_nodes=2, interface="ib0")) == "ib0"
    routes.write_text("")
    with pytest.raises(ConfigError, match=r"cluster\.interface=: .* has no default route"):
        interface_of(ClusterConfig(num_nodes=2))
