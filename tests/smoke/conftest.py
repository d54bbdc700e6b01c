"""One real run that several smoke tests look at: start-up is most of what a run costs here."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from tests.helpers.matpo import QUICKSTART, start_matpo, wait_for_step

STEPS = 4
BATCH = ("data.prompts_per_step=2", "data.samples_per_prompt=4", f"run.steps={STEPS}")


@pytest.fixture(scope="session")
def live_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of the quickstart's recipe, four small steps."""
    folder = tmp_path_factory.mktemp("runs")
    log = folder / "output.txt"
    process = start_matpo(
        "train", QUICKSTART, f"run.dir={folder}", "run.name=live", *BATCH, log=log
    )
    wait_for_step(folder / "live", 1, 240, process)
    (folder / "listening.json").write_text(json.dumps(listening_addresses(process.pid)))
    assert process.wait(timeout=240) == 0, log.read_text()
    assert f"step {STEPS}/{STEPS}" in log.read_text()
    return folder / "live"


def listening_addresses(pid: int) -> list[str]:
    """`ADDRESS COMMAND` of every TCP socket on which a process or its descendants listen."""
    found = []
    process = psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
        try:
            command = " ".join(one.cmdline())
            sockets = one.net_connections("tcp")
        except psutil.Error:
            continue
        found += [f"{item.laddr.ip} {command}" for item in sockets if item.status == "LISTEN"]
    return found
