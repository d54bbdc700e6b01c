"""Proves what the doctor says of interfaces (this machine's own) and InfiniBand (a fake sysfs)."""

from __future__ import annotations

import resource

import pytest

from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.doctor import network
from megatron_matpo.doctor.network import (
    check_infiniband,
    check_interface,
    check_locked_memory,
    list_ports,
    matching,
    own_addresses,
)
from tests.helpers.doctor_site import fake_infiniband, only, site_of

NAMES = ["lo", "eth0", "eth1", "ib0", "docker0"]


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth0", ["eth0"]),
        ("eth1,ib", ["eth1", "ib0"]),
        ("^lo,docker", ["eth0", "eth1", "ib0"]),
        ("^=eth0", ["lo", "eth1", "ib0", "docker0"]),
        ("bond", []),
    ],
)
def test_patterns_are_those_of_nccl(pattern, taken):
    assert matching(pattern, NAMES) == taken


def test_the_named_interface_has_an_address_or_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    line = only(check_interface(site_of(tmp_path, num_nodes=2)))
    assert (line.status, line.seen) == ("pass", "lo 127.0.0.1")
    assert own_addresses(site_of(tmp_path).config) == ["127.0.0.1"]
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch")
    line = only(check_interface(site_of(tmp_path, num_nodes=2)))
    assert line.status == "fail"
    assert "lo 127.0.0.1" in line.seen


def test_the_recipes_interface_goes_before_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch")
    site = site_of(tmp_path, num_nodes=2, cluster=ClusterConfig(interface="lo"))
    assert only(check_interface(site)).seen == "lo 127.0.0.1"
    site = site_of(tmp_path, num_nodes=2, cluster=ClusterConfig(interface="l"))
    line = only(check_interface(site))
    assert (line.status, line.seen.partition(" ")[0]) == ("fail", "cluster.interface=l")


def test_several_nodes_with_several_networks_need_a_name(tmp_path, monkeypatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(network, "addresses", lambda: {"eth0": "10.0.0.1", "ib0": "10.1.0.1"})
    site = site_of(tmp_path, num_nodes=2, root=tmp_path)
    line = only(check_interface(site))
    assert (line.status, "no default route" in line.seen) == ("fail", True)
    routes = tmp_path / "proc" / "net" / "route"
    routes.parent.mkdir(parents=True)
    head = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT"
    routes.write_text(f"{head}\neth0 00000000 0101A8C0 0003 0 0 100 00000000 0 0 0\n")
    line = only(check_interface(site))
    assert line.status == "warn"
    assert "the run takes eth0 10.0.0.1, of the default route" in line.seen
    assert "ib0 10.1.0.1" in line.seen
    monkeypatch.setattr(network, "addresses", lambda: {"eth0": "10.0.0.1"})
    assert only(check_interface(site)).status == "pass"
    assert only(check_interface(site_of(tmp_path))).status == "pass"


def test_ports_are_read_as_the_kernel_writes_them(tmp_path):
    root = fake_infiniband(tmp_path / "fake_sysfs", mlx5_0="4: ACTIVE", mlx5_1="1: DOWN")
    first, second = list_ports(root)
    assert (first.name, first.is_active, first.gb_s, first.link) == (
        *("mlx5_0:1", True, 25.0),
        "InfiniBand",
    )
    assert (second.state, second.is_active) == ("DOWN", False)


def test_active_ports_pass_and_a_port_that_is_down_is_named(tmp_path):
    root = fake_infiniband(tmp_path / "fake_sysfs", mlx5_0="4: ACTIVE", mlx5_1="4: ACTIVE")
    line = only(check_infiniband(site_of(tmp_path, gpus=8, num_nodes=2, root=root)))
    assert (line.status, line.seen) == (
        "pass",
        "2 of 2 ports active (InfiniBand), 50 GB/s each way",
    )
    root = fake_infiniband(tmp_path / "fake_other", mlx5_0="4: ACTIVE", mlx5_3="2: INIT")
    line = only(check_infiniband(site_of(tmp_path, gpus=8, num_nodes=2, root=root)))
    assert line.status == "warn"
    assert "mlx5_3:1 INIT" in line.seen


def test_no_active_port_fails_between_nodes_only(tmp_path):
    root = fake_infiniband(tmp_path / "fake_sysfs", mlx5_0="1: DOWN")
    assert (
        only(check_infiniband(site_of(tmp_path, gpus=8, num_nodes=2, root=root))).status == "fail"
    )
    assert only(check_infiniband(site_of(tmp_path, root=root))).status == "warn"
    site = site_of(tmp_path, gpus=8, num_nodes=2, root=tmp_path / "fake_empty")
    assert "TCP" in only(check_infiniband(site)).seen
    assert only(check_infiniband(site_of(tmp_path, root=tmp_path / "fake_empty"))).status == "pass"


def test_a_container_without_the_devices_is_told_how_to_get_them(tmp_path):
    root = fake_infiniband(tmp_path / "fake_sysfs", mlx5_0="4: ACTIVE")
    (root / "dev/infiniband/uverbs0").unlink()
    line = only(check_infiniband(site_of(tmp_path, gpus=8, num_nodes=2, root=root)))
    assert line.status == "fail"
    assert "--device=/dev/infiniband" in line.fix


def test_limited_locked_memory_matters_where_infiniband_is(tmp_path, monkeypatch):
    root = fake_infiniband(tmp_path / "fake_sysfs", mlx5_0="4: ACTIVE")
    monkeypatch.setattr(network.resource, "getrlimit", lambda _: (65536, 65536))
    line = only(check_locked_memory(site_of(tmp_path, root=root)))
    assert (line.status, line.seen.startswith("64 KiB")) == ("warn", True)
    assert (
        only(check_locked_memory(site_of(tmp_path, root=tmp_path / "fake_none"))).status == "pass"
    )
    unlimited = (resource.RLIM_INFINITY,) * 2
    monkeypatch.setattr(network.resource, "getrlimit", lambda _: unlimited)
    assert only(check_locked_memory(site_of(tmp_path, root=root))).seen == "unlimited"
