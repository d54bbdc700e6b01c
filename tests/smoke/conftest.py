"""One real run that several smoke tests look at: start-up is most of what a run costs here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.matpo import QUICKSTART, run_matpo

STEPS = 4
BATCH = ("data.prompts_per_step=2", "data.samples_per_prompt=4", f"run.steps={STEPS}")


@pytest.fixture(scope="session")
def live_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of the quickstart's recipe, four small steps."""
    folder = tmp_path_factory.mktemp("runs")
    done = run_matpo("train", QUICKSTART, f"run.dir={folder}", "run.name=live", *BATCH)
    assert done.returncode == 0, done.stdout
    assert f"step {STEPS}/{STEPS}" in done.stdout
    return folder / "live"
