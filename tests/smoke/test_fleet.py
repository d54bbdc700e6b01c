"""An engine is killed while it generates: the run goes on, and the engine comes back.

Real parts: the quickstart's recipe with two SGLang servers. Other ways to die (in a bucket, between
the end and the verification, frozen) are in the chaos tests; all sequences of events in
tests/unit/rollout/test_health.py.
"""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.live_fleet import LiveFleet
from tests.helpers.matpo import (
    QUICKSTART,
    read_metrics,
    start_matpo,
    wait_for_step,
    wait_until_gone,
)
from tests.helpers.sglang_servers import ROLLOUT_PYTHON

PROMPTS, SAMPLES = 4, 8

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not ROLLOUT_PYTHON.exists(), reason="no .venv-rollout: run make setup"),
]


def test_a_killed_engine_is_started_anew_refitted_and_serves_again(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "fleet", tmp_path / "out.log"
    process = start_matpo(
        *("train", QUICKSTART, f"run.dir={tmp_path}", "run.name=fleet", "run.steps=400"),
        *(f"data.prompts_per_step={PROMPTS}", f"data.samples_per_prompt={SAMPLES}"),
        *("rollout.num_servers=2", "rollout.max_total_tokens=20480", "weight_sync.verify=full"),
        *("rollout.health.probe_every_s=2", "rollout.restart_backoff_s=0.5"),
        *("checkpoint.every=0", "checkpoint.export_hf=false"),
        log=log,
    )
    fleet = LiveFleet(run_dir)
    try:
        wait_for_step(run_dir, 1, timeout_s=300)
        fleet.wait_for_phase("rollout", 2)
        time.sleep(0.3)
        victim = fleet.engine(1)
        fleet.signal(1, signal.SIGKILL)
        killed_in = int(read_metrics(run_dir)[-1]["step"]) + 1
        fleet.wait_for_states("healthy", "dead", timeout_s=60)
        wait_for_step(run_dir, killed_in, timeout_s=120)
        fleet.wait_for_states("healthy", "healthy")
        assert fleet.engine(1).pid != victim.pid
        assert fleet.engines()[1]["incarnation"] == 1
        back_in = int(read_metrics(run_dir)[-1]["step"]) + 1
        wait_for_step(run_dir, back_in + 2, timeout_s=120)
        assert fleet.assert_alike() >= back_in, "pushes go on with both"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=120) == 75, log.read_text()
    finally:
        process.kill()
    assert wait_until_gone(run_dir) == []
    text = log.read_text()
    assert re.search(
        r"engine-1: ended by SIGKILL .*; starting it anew in 0\.5 s \(restart 1, ", text
    )
    assert re.search(r"engine-1 ready \d+\.\d s after restart 1", text)
    assert "failed" not in text, text
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    for line in lines:
        fleet.assert_episodes_whole(int(line["step"]), PROMPTS, SAMPLES)
        assert line["mismatch/abs_logprob"] < 1e-4, "whichever engine sampled, it had the weights"
