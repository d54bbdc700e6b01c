"""Proves a run whose trainer and engine are 200 ms apart on a link that loses packets."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.matpo import QUICKSTART, ROOT, matpo_command, read_metrics, wait_until_gone
from tests.helpers.slow_link import INTERFACE, Host, two_hosts, why_not

STEPS = 3
ROUND_TRIP_S = 0.2
LOSS = 0.01
BATCH = ("data.prompts_per_step=2", "data.samples_per_prompt=4", f"run.steps={STEPS}")

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


def start_on(host: Host, rank: int, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environ = {"MATPO_NODE_RANK": str(rank), "MATPO_NUM_NODES": "2", "MATPO_LAUNCH_ID": "far"}
    with log.open("ab") as file:
        return subprocess.Popen(
            host.command(matpo_command(*arguments)),
            cwd=ROOT,
            env={**os.environ, **environ},
            stdout=file,
            stderr=file,
        )


def test_trainer_and_engine_far_apart(tmp_path: Path) -> None:
    command = [
        *("train", QUICKSTART, f"run.dir={tmp_path}", "run.name=far", *BATCH),
        *("cluster.num_nodes=2", "cluster.trainer_nodes=1", f"cluster.interface={INTERFACE}"),
    ]
    logs = [tmp_path / f"node{rank}.log" for rank in (0, 1)]
    with two_hosts(delay_s=ROUND_TRIP_S / 2, loss=LOSS) as hosts:
        nodes = [start_on(hosts[rank], rank, logs[rank], *command) for rank in (0, 1)]
        try:
            codes = [node.wait(timeout=500) for node in nodes]
        finally:
            for node in nodes:
                node.kill()
    assert codes == [0, 0], [log.read_text()[-3000:] for log in logs]
    assert "engine-0 ready" in logs[1].read_text() and "engine-0" not in logs[0].read_text()
    lines = read_metrics(tmp_path / "far")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["rollout/episodes"] == 8 and line["rollout/failed"] == 0
        assert line["mismatch/abs_logprob"] < 1e-4
    assert wait_until_gone(tmp_path / "far") == []
