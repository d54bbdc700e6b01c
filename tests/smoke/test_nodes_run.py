"""Several nodes on one machine (loopback), the same command on each, without a scheduler."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.matpo import ROOT, matpo_command, read_metrics, wait_until_gone
from tests.smoke.conftest import STEPS
from tests.smoke.test_resume import losses, replay

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(900)]
LOOPBACK = ("cluster.num_nodes=2", "cluster.interface=lo")


def start_node(rank: int, launch: str, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    environ = {"MATPO_NODE_RANK": str(rank), "MATPO_NUM_NODES": "2", "MATPO_LAUNCH_ID": launch}
    with log.open("ab") as file:
        return subprocess.Popen(
            matpo_command(*arguments),
            cwd=ROOT,
            env={**os.environ, **environ},
            stdout=file,
            stderr=file,
        )


def test_ranks_of_two_nodes_compute_what_those_of_one_do(live_run, tmp_path):
    command = [*replay(live_run, tmp_path, "two"), *LOOPBACK, "cluster.trainer_nodes=2"]
    logs = [tmp_path / f"node{rank}.log" for rank in (0, 1)]
    nodes = [start_node(rank, "a", *command, log=logs[rank]) for rank in (0, 1)]
    codes = [node.wait(timeout=300) for node in nodes]
    texts = [log.read_text() for log in logs]
    assert codes == [0, 0], texts
    assert "on 2 nodes: 2 trainer ranks" in texts[0]
    assert "node 1 (" in texts[1] and "trainer-node-1 ready" in texts[1]
    assert [line["step"] for line in read_metrics(tmp_path / "two")] == list(range(1, STEPS + 1))
    assert losses(tmp_path / "two") == losses(live_run)
    assert wait_until_gone(tmp_path / "two") == []


def test_what_is_wrong_on_one_node_ends_the_command_on_both(live_run, tmp_path):
    command = [*replay(live_run, tmp_path, "bad"), *LOOPBACK]
    logs = [tmp_path / f"node{rank}.log" for rank in (0, 1)]
    good = start_node(0, "a", *command, log=logs[0])
    bad = start_node(1, "a", *command, "model.path=/no/such/model", log=logs[1])
    assert bad.wait(timeout=120) == 2
    assert good.wait(timeout=120) == 2
    assert "model.path=/no/such/model: no such folder" in logs[0].read_text()
    assert "node 1 (" in logs[0].read_text()
