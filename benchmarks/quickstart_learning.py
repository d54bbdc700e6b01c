"""Does the quickstart learn, and only for the right reason?

    .venv/bin/python benchmarks/quickstart_learning.py [--seeds 1 2 3] [--json] [key=value ...]

Trains `recipes/quickstart.yaml` once per seed, once with all advantages zeroed, and once without
pushing weights to the engines, and prints a table of the accuracy reward: mean of the first five
steps, mean of the last five, and the gain. With `--json` the last line is one object:

* `min_gain`: smallest gain over the seeds;
* `gain_zero_advantage`: gain with `algo.advantage_scale=0` (nothing is learned);
* `gain_no_weight_push`: gain with `weight_sync.transport=none`: the trainer moves, but the engines
  that are measured keep the first weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "quickstart.yaml"
WINDOW = 5


@dataclass(frozen=True)
class Curve:
    """Accuracy of one run at its ends."""

    label: str
    first: float
    last: float
    minutes: float

    @property
    def gain(self) -> float:
        """Last five steps minus first five."""
        return self.last - self.first


def train(label: str, folder: Path, overrides: list[str]) -> Curve:
    """Run the recipe to its end in a fresh folder and read its metrics.

    Raises:
        subprocess.CalledProcessError: the run failed; its output is above.
    """
    name = label.replace(" ", "-").replace("=", "-")
    shutil.rmtree(folder / name, ignore_errors=True)
    started = time.monotonic()
    command = [
        *(sys.executable, "-m", "megatron_matpo", "train", str(RECIPE)),
        *(f"run.dir={folder}", f"run.name={name}", "obs.wandb_mode=disabled", *overrides),
    ]
    print(f"--- {label}", file=sys.stderr, flush=True)
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    accuracy = [json.loads(line)["reward/accuracy"] for line in lines]
    if len(accuracy) < 2 * WINDOW:
        raise SystemExit(f"{label}: {len(accuracy)} steps are too few; need {2 * WINDOW}")
    return Curve(
        label,
        sum(accuracy[:WINDOW]) / WINDOW,
        sum(accuracy[-WINDOW:]) / WINDOW,
        (time.monotonic() - started) / 60,
    )


def main() -> None:
    """Run all and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmark")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", help="key=value for all runs")
    arguments = parser.parse_intermixed_args()

    def run(label: str, *overrides: str) -> Curve:
        return train(label, arguments.runs, [*overrides, *arguments.overrides])

    curves = [run(f"seed={seed}", f"run.seed={seed}") for seed in arguments.seeds]
    frozen = run("zero advantage", "algo.advantage_scale=0")
    unpushed = run("no weight push", "weight_sync.transport=none")
    print(f"{'run':<16} {'first 5':>8} {'last 5':>8} {'gain':>8} {'minutes':>8}")
    for curve in (*curves, frozen, unpushed):
        print(
            f"{curve.label:<16} {curve.first:>8.3f} {curve.last:>8.3f} {curve.gain:>+8.3f} "
            f"{curve.minutes:>8.1f}"
        )
    if arguments.json:
        result = {
            "min_gain": round(min(curve.gain for curve in curves), 4),
            "gain_zero_advantage": round(frozen.gain, 4),
            "gain_no_weight_push": round(unpushed.gain, 4),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
