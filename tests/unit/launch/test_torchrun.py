"""Proves that ranks are formed, log to files of their own, and that failed ranks are told apart.

The entry modules are FakeTrainers: they look at torchrun's environment and form no group.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_matpo.config import Config, dump_config
from megatron_matpo.config.plan import num_ports
from megatron_matpo.config.train import ParallelConfig
from megatron_matpo.launch.origin import Death, find_origin
from megatron_matpo.ports import free_ports
from tests.helpers.plans import lone_plan

pytestmark = [pytest.mark.dist, pytest.mark.slow]

FAKE_TRAINER = """
import os, sys, time
rank = int(os.environ["RANK"])
print("Fake rank", rank, "of", os.environ["WORLD_SIZE"], end=" ")
print(os.environ["OMP_NUM_THREADS"], sys.argv[1:])
MODE = {mode!r}
if MODE == "kill" and rank == 1:
    os.kill(os.getpid(), 9)
if MODE == "raise" and rank == 1:
    raise ValueError("Fake import error")
if MODE != "ok":
    time.sleep(60)
"""


def launch(run_dir: Path, mode: str) -> int:
    for name in ("logs", "status"):
        (run_dir / name).mkdir()
    config = replace(Config(), parallel=ParallelConfig(tensor=2))
    plan = lone_plan(config, free_ports("127.0.0.1", num_ports(config)))
    (run_dir / "config.yaml").write_text(dump_config(config))
    (run_dir / "plan.json").write_text(plan.to_json())
    (run_dir / "fake_trainer.py").write_text(FAKE_TRAINER.format(mode=mode))
    argv = [sys.executable, "-m", "megatron_matpo.launch.torchrun", "--run-dir", str(run_dir)]
    search = os.pathsep.join([os.getcwd(), str(run_dir)])
    with (run_dir / "logs" / "trainer.log").open("w") as log:
        return subprocess.run(
            [*argv, "--entry", "fake_trainer", "--node", "0"],
            env={**os.environ, "PYTHONPATH": search},
            stdout=log,
            stderr=log,
            timeout=60,
        ).returncode


def test_every_rank_runs_the_entry_and_has_its_log(tmp_path):
    code = launch(tmp_path, "ok")
    assert code == 0, (tmp_path / "logs" / "trainer.log").read_text()
    for rank in (0, 1):
        text = (tmp_path / "logs" / f"trainer-{rank}.log").read_text()
        assert text == f"Fake rank {rank} of 2 1 ['--run-dir', '{tmp_path}']\n"


@pytest.mark.parametrize(
    ("mode", "expected"), [("kill", "SIGKILL"), ("raise", "ValueError: Fake import error")]
)
def test_the_rank_that_failed_is_the_origin(tmp_path, mode, expected):
    assert launch(tmp_path, mode) == 1
    origin = find_origin(tmp_path, [Death("trainer", 1, 0.0)])
    assert origin is not None
    assert origin.name == "trainer-1"
    assert expected in origin.what
