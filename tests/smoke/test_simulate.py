"""A real run's folder goes through `matpo simulate --from-run`, and predicts its own last step.

Learned from the steps before it. Both are four or eight small episodes on a machine that may be
busy, so the bound is wide; benchmarks/simulate.py is the measurement, this the proof that records
of a live run are what the simulator reads.
"""

import json

import pytest

from tests.helpers.matpo import QUICKSTART, read_metrics, run_matpo
from tests.smoke.conftest import BATCH, STEPS

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(600)]


def test_a_live_run_is_simulated(live_run):
    sizes = [item for item in BATCH if not item.startswith("run.")]
    done = run_matpo(
        "simulate", QUICKSTART, *sizes, "--json", "--from-run", str(live_run),
        "--fit-steps", f"1-{STEPS - 1}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    said = json.loads(done.stdout)
    assert said["episodes"] == 8
    own = said["placements"][0]
    last = read_metrics(live_run)[-1]
    ratio = own["step_s"] / last["time/step_s"]
    print(f"predicted over measured: {ratio:.2f}")
    assert 0.2 < ratio < 5
    assert own["train_s"] > 0 and own["sync_s"] > 0
    assert said["sampled_per_episode"] == pytest.approx(last["tokens/sampled"] / 8, rel=0.5)
