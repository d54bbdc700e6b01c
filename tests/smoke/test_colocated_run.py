"""The quickstart with trainer and engine on the same devices, by override alone.

On the CPU: the order of states, the engine's own verbs and shared memory are real; that memory of a
GPU becomes free is not shown here.
"""

import math
import os

import pytest

from tests.helpers.matpo import QUICKSTART, read_metrics, run_matpo

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(600)]
SMALL = (
    *("cluster.placement=colocated", "run.steps=3", "data.prompts_per_step=2"),
    *("data.samples_per_prompt=4", "weight_sync.verify=full", "weight_sync.bucket_mb=1"),
    *("checkpoint.every=2", "eval.every=2", "eval.max_rows=4", "eval.before_train=true"),
)


def test_quickstart_in_turns_on_the_same_devices(tmp_path):
    before = set(os.listdir("/dev/shm"))
    done = run_matpo("train", QUICKSTART, f"run.dir={tmp_path}", "run.name=shared", *SMALL)
    assert done.returncode == 0, done.stdout
    run_dir = tmp_path / "shared"
    start, *lines = read_metrics(run_dir)
    assert start["step"] == 0 and "eval/matpo_eval/mean@1" in start, "engines serve before training"
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert math.isfinite(line["loss/policy"])
        assert line["mismatch/abs_logprob"] < 1e-4
        assert line["policy_version"] == line["step"]
        assert line["rollout/failed"] == 0
        assert 0 < line["time/switch_s"] < line["time/step_s"]
    assert "eval/matpo_eval/mean@1" in lines[1]
    assert (run_dir / "checkpoints" / "step_2").is_dir()
    assert (run_dir / "checkpoints" / "hf" / "model.safetensors").is_file()
    left = {name for name in set(os.listdir("/dev/shm")) - before if "matpo" in name}
    assert left == set()
