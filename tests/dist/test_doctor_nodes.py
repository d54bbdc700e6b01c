"""Proves `matpo doctor` over two nodes: two processes that meet in a folder and form gloo groups.

Nodes are processes of one machine, so a shared file system and a network between machines are not
part of it; a folder of its own stands for a file system that is not shared. NCCL needs GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_matpo.doctor.groups import Outcome, expectation, report
from megatron_matpo.doctor.lines import Line
from megatron_matpo.doctor.meeting import Host, PeerLostError, join
from megatron_matpo.doctor.nodes import lead
from megatron_matpo.launch.nodes import Node
from tests.helpers.doctor_site import fake_infiniband, site_of

ROOT = Path(__file__).parents[2]
SETTINGS = (
    *("doctor.min_disk_mb_s=0", "doctor.allreduce_mib=8", "doctor.disk_test_mib=1"),
    "doctor.nodes_timeout_s=30",
)


def start(rank: int, folder: Path, *settings: str, ahead_s: float = 0.0, packages: str = ""):
    """Node `rank` of two."""
    env = {
        **os.environ,
        "MATPO_NODE_RANK": str(rank),
        "MATPO_NUM_NODES": "2",
        "MATPO_LAUNCH_ID": "t",
        "PYTHONPATH": f"{packages}{ROOT}",
    }
    argv = [sys.executable, "-m", "tests.helpers.doctor_node", str(ahead_s), f"run.dir={folder}"]
    return subprocess.Popen(
        [*argv, *SETTINGS, *settings],
        env=env,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def end(node) -> tuple[int, list[dict[str, str]]]:
    """Exit code and lines."""
    out, err = node.communicate(timeout=200)
    assert err == ""
    return node.returncode, json.loads(out) if out else []


def node_of(lines: list[dict[str, str]], name: str) -> str:
    (node,) = {line["node"] for line in lines if line["name"] == name}
    return node.partition(" ")[0]


def by_name(lines: list[dict[str, str]], name: str) -> list[tuple[str, str]]:
    return [(line["status"], line["seen"]) for line in lines if line["name"] == name]


@pytest.mark.slow
def test_two_nodes_meet_reduce_and_form_a_group_and_a_skewed_clock_is_named(tmp_path):
    # What an earlier start with the same id left behind: nobody listens there.
    stale = {"addresses": ["127.0.0.1"], "port": 9, "token": "old"}
    (tmp_path / ".matpo-doctor-t.json").write_text(json.dumps(stale))
    second = start(1, tmp_path, ahead_s=5.0)
    first = start(0, tmp_path)
    code, lines = end(first)
    other_code, other_lines = end(second)
    assert (code, other_code, other_lines) == (0, 0, [])
    assert by_name(lines, "nodes.meeting") == [("pass", f"2 nodes met in {tmp_path}")]
    ((status, seen),) = by_name(lines, "nodes.clock")
    assert status == "warn"
    assert seen.startswith("its clock is +5.0") and node_of(lines, "nodes.clock") == "1"
    ((status, seen),) = by_name(lines, "nodes.allreduce")
    assert status == "pass"
    assert "2 ranks over gloo" in seen and "GB/s" in seen
    ((status, seen),) = by_name(lines, "nodes.weight_sync")
    assert (status, seen.startswith("a group of 2")) == ("pass", True)
    labels = {line["node"].partition(" ")[0] for line in lines if line["name"] == "disk.speed"}
    assert labels == {"0", "1"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_node_that_fails_ends_with_1_and_the_others_with_3(tmp_path):
    second = start(1, tmp_path, "cluster.gpus_per_node=1", "doctor.collective_timeout_s=60")
    first = start(0, tmp_path)
    code, lines = end(first)
    other_code, _ = end(second)
    assert (code, other_code) == (3, 1)
    failed = {(line["name"], line["node"][:1]) for line in lines if line["status"] == "fail"}
    assert ("gpu.devices", "1") in failed
    assert not any(node == "0" for _, node in failed)


def test_a_node_that_never_comes_is_named_and_one_that_sees_another_folder_says_so(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    limit = "doctor.nodes_timeout_s=6"
    first, second = start(0, tmp_path / "a", limit), start(1, tmp_path / "b", limit)
    code, lines = end(first)
    assert code == 3
    assert by_name(lines, "nodes.meeting") == [("fail", "did not come in 6 s")]
    assert node_of(lines, "nodes.meeting") == "1"
    assert by_name(lines, "nodes.allreduce") == [("skipped", "not all nodes are there")]
    assert by_name(lines, "disk.speed")[0][0] == "pass"
    code, lines = end(second)
    assert code == 1
    ((status, seen),) = by_name(lines, "nodes.meeting")
    assert status == "fail"
    assert "did not appear" in seen and "doctor.nodes_timeout_s=6" in seen


@pytest.mark.slow
def test_a_node_whose_ranks_fail_is_named_and_the_other_does_not_hang(tmp_path):
    """Its torch is a fake that cannot be imported; the other node waits for it until the limit."""
    (tmp_path / "fake/torch").mkdir(parents=True)
    (tmp_path / "fake/torch/__init__.py").write_text("raise ImportError('libcudart.so.13')")
    runs = tmp_path / "runs"
    runs.mkdir()
    limit = "doctor.collective_timeout_s=25"
    first = start(0, runs, limit)
    second = start(1, runs, limit, packages=f"{tmp_path / 'fake'}:")
    code, lines = end(first)
    ((status, seen),) = by_name(lines, "nodes.allreduce")
    assert status == "fail"
    assert "stopped at 'start'" in seen and "ImportError: libcudart.so.13" in seen
    if "all stopped" not in seen:  # the first node's import of torch took longer than its limit
        assert node_of(lines, "nodes.allreduce") == "1"
        assert (code, end(second)[0]) == (3, 1)


def test_a_node_that_goes_away_is_named_and_not_waited_for(tmp_path):
    nodes = [Node(rank, 2, "x", f"n{rank}") for rank in (0, 1)]
    site = replace(site_of(tmp_path, num_nodes=2), mode="preflight")

    def come_and_go() -> list[Line]:
        join(lambda: tmp_path, nodes[1], 5.0).close()
        return []

    shown: list[Line] = []
    assert lead(site, nodes[0], come_and_go, time.time, shown.extend) == 3
    (gone,) = (line for line in shown if line.status == "fail")
    assert (gone.name, gone.seen, gone.node) == (
        *("nodes.meeting", "came, and then: it ended"),
        "1 (n1)",
    )
    assert {line.name for line in shown if line.status == "skipped"} == {
        *("nodes.clock", "nodes.allreduce", "nodes.weight_sync")
    }


def test_strangers_are_not_taken_for_nodes(tmp_path):
    import socket

    nodes = [Node(rank, 2, "x", f"n{rank}") for rank in (0, 1)]
    with Host(tmp_path, nodes[0], ["127.0.0.1"]) as host:
        meeting = json.loads((tmp_path / ".matpo-doctor-x.json").read_text())
        with socket.create_connection(("127.0.0.1", meeting["port"])) as stranger:
            stranger.sendall(b'{"token": "guess", "rank": 1, "host": "evil"}\n')
            host.gather(0.5)
            assert host.peers == {}
        assert (tmp_path / ".matpo-doctor-x.json").stat().st_mode & 0o077 == 0
        link = join(lambda: tmp_path, nodes[1], 5.0)
        host.gather(5.0)
        assert list(host.peers) == [1]
        link.close()
        with pytest.raises(PeerLostError, match="it ended"):
            host.peers[1].link.receive(5.0)
    assert list(tmp_path.iterdir()) == []


def test_the_node_that_came_least_far_is_blamed(tmp_path):
    site = site_of(tmp_path, gpus=8, num_nodes=4)
    outcomes = [
        Outcome("0 (a)", "all-reduce", "no answer in 300 s", 300.0),
        Outcome("1 (b)", "meet", "no answer in 300 s", 300.0),
        Outcome("2 (c)", "meet", "RuntimeError: no route to host", 3.0),
        Outcome("3 (d)", "all-reduce", "no answer in 300 s", 300.0),
    ]
    first, second, skipped = report(site, outcomes)
    assert (first.status, second.status, skipped.status) == ("fail", "fail", "skipped")
    assert (first.node, second.node) == ("2 (c)", "1 (b)")
    assert first.seen.startswith("stopped at 'meet' after 3 s: RuntimeError: no route to host")
    assert first.seen.endswith("others came to 'all-reduce'")
    later = [Outcome("0 (a)", "broadcast", "x", 9.0), Outcome("1 (b)", "weight-sync group", "y")]
    first, second = report(site, later)
    assert (first.status, second.status, second.node) == ("pass", "fail", "1 (b)")
    nobody, _ = report(site, outcomes[1:3])
    assert nobody.node == ""
    assert nobody.seen.endswith("no route to host; node 2 (c) was the first")


def test_bandwidth_is_compared_with_half_of_the_links(tmp_path):
    ports = {f"mlx5_{index}": "4: ACTIVE" for index in range(4)}
    root = fake_infiniband(tmp_path / "fake_sysfs", **ports)
    site = site_of(tmp_path, gpus=8, num_nodes=2, root=root)
    assert expectation(site) == (50.0, "half of 4 active InfiniBand ports")
    done = [Outcome(str(rank), "done", gb_s=40.0, sync_s=1.0) for rank in range(2)]
    line, sync = report(site, done)
    assert (line.status, sync.status) == ("warn", "pass")
    assert "40.00 GB/s" in line.seen and "at least 50" in line.seen
    fast = [Outcome(str(rank), "done", gb_s=90.0) for rank in range(2)]
    assert report(site, fast)[0].status == "pass"
    assert expectation(site_of(tmp_path, num_nodes=2)) == (0.0, "")
