"""`matpo eval` with a real engine: a killed evaluation resumes, its figures are its episodes'.

Statistics are proved in tests/unit/evaluation; here one oracle recomputes two of them from the
recorded rollouts.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter

import pytest

from tests.helpers.matpo import QUICKSTART, run_matpo, start_matpo, wait_until_gone

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(600)]
POLICY = "examples/smallworld/policy"
DATA = "examples/smallworld/data/matpo_eval.parquet"
ROWS, SAMPLES = 8, 2


def command(folder, *more):
    return [
        *("eval", QUICKSTART, "--model", POLICY, "--data", DATA),
        *("--samples", str(SAMPLES), "--max-rows", str(ROWS), *more),
        *(f"run.dir={folder}", "run.name=judged", "eval.chunk_rows=1", "eval.chunks_in_flight=1"),
    ]


def result_lines(run_dir):
    path = run_dir / "eval" / "matpo_eval" / "results.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def planners(folder, numbers):
    """Recorded planner trajectories of these chunks."""
    files = [folder / f"chunk_{number:06d}.jsonl" for number in numbers]
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [record for record in records if record["role"] == "planner"]


def chunk_numbers(folder):
    return sorted(int(file.stem.split("_")[1]) for file in folder.glob("chunk_*.jsonl"))


def test_a_killed_evaluation_resumes_and_asks_no_row_twice(tmp_path):
    run_dir = tmp_path / "judged"
    folder = run_dir / "eval" / "matpo_eval"
    process = start_matpo(*command(tmp_path), log=tmp_path / "out.log")
    end = time.monotonic() + 200
    while len(result_lines(run_dir)) < 3 * SAMPLES:
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "out.log").read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert wait_until_gone(run_dir) == []
    kept, recorded = result_lines(run_dir), chunk_numbers(folder)
    assert len(kept) < ROWS * SAMPLES, "the evaluation was over before the kill"

    done = run_matpo(*command(tmp_path))
    assert done.returncode == 0, done.stdout
    assert wait_until_gone(run_dir) == []
    lines = result_lines(run_dir)
    assert lines[: len(kept)] == kept
    results = [json.loads(line) for line in lines]
    pairs = Counter((item["row"], item["sample"]) for item in results)
    assert pairs == Counter((row, i) for row in range(ROWS) for i in range(SAMPLES))
    later = planners(folder, set(chunk_numbers(folder)) - set(recorded))
    assert not {item["row_index"] for item in later} & {json.loads(x)["row"] for x in kept}

    # A kill can fall between a chunk's recording and its results; then the later recording counts.
    verdicts = {
        (record["row_index"], record["sample_index"]): record["accuracy_reward"]
        for record in planners(folder, chunk_numbers(folder))
    }
    accuracies = [[verdicts[row, i] for i in range(SAMPLES)] for row in range(ROWS)]
    measures = json.loads((run_dir / "eval" / "results.json").read_text())["sets"]["matpo_eval"]
    means = [sum(items) / len(items) for items in accuracies]
    best = [max(items) for items in accuracies]
    assert measures["measures"]["mean@2"]["value"] == pytest.approx(sum(means) / ROWS)
    assert measures["measures"]["best@2"]["value"] == pytest.approx(sum(best) / ROWS)
    assert "| matpo_eval |" in done.stdout and "16/16" in done.stdout

    again = run_matpo(*command(tmp_path), timeout_s=60)
    assert again.returncode == 0 and "nothing is missing" in again.stdout
    assert result_lines(run_dir) == lines
    other = run_matpo(*command(tmp_path, "rollout.temperature=0.5"), timeout_s=60)
    assert other.returncode == 2 and "rollout.temperature: 1.0 -> 0.5" in other.stdout


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--model", "/nowhere/model", "model.path=/nowhere/model: no such folder"),
        ("--data", "no_such_set", "eval.sets=no_such_set: no such file or folder"),
        ("--model", "another", "GPT2LMHeadModel"),
    ],
)
def test_bad_input_is_one_message_and_nothing_starts(tmp_path, option, value, words):
    if value == "another":
        value = str(tmp_path / "another")
        os.mkdir(value)
        (tmp_path / "another" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    arguments = command(tmp_path)
    arguments[arguments.index(option) + 1] = value
    done = run_matpo(*arguments, timeout_s=60)
    assert done.returncode == 2, done.stdout
    assert words in done.stdout and "Traceback" not in done.stdout
    assert not (tmp_path / "judged").exists()
    assert wait_until_gone(tmp_path / "judged") == []
