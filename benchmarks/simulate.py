"""How far is `matpo simulate` from real runs that it has not seen?

Run `.venv/bin/python benchmarks/simulate.py [--json] [--steps 5] [--keep FOLDER]`, some five
minutes on an idle machine with two cores.

Three real runs of the quickstart's recipe (Megatron-Core trainer, SGLang server, MCP server), one
after another, with 8, 32 and 64 episodes per step. Two predictions, both by the command's own code:

* `other_concurrency`: rates and lengths from the runs with 8 and 64 episodes; predicted: a step of
  the run with 32, of which nothing was looked at;
* `later_steps`: rates and lengths from the first steps of the run with 64 episodes (its very first
  left out); predicted: its later steps.

Each is the mean predicted over the median measured time: of the whole step, of the collection of
episodes and of training. `predicted_over_measured` is that of the step, at the other concurrency.
Steps are as the run's metrics have them (`time/step_s`); the first of each run warms up and counts
nowhere. On a busy machine the runs differ among themselves, and the ratio says nothing: `spread` is
the slowest over the fastest step per sampled token of the run that is predicted (1.3 on an idle
machine), `load_per_core` the load average when each run began, other work of the machine that is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file: `benchmarks` is no installed package

from megatron_matpo.simulation.command import Request, simulate  # noqa: E402
from megatron_matpo.simulation.records import read_run  # noqa: E402

RECIPE = str(ROOT / "recipes" / "quickstart.yaml")
SIZES = {"small": (2, 4), "middle": (4, 8), "large": (8, 8)}
"""Questions and samples of each."""


def overrides_of(name: str) -> list[str]:
    """The size of a run's step."""
    prompts, samples = SIZES[name]
    return [f"data.prompts_per_step={prompts}", f"data.samples_per_prompt={samples}"]


def make_run(name: str, folder: Path, num_steps: int) -> float | None:
    """Train, unless the folder has the run already; returns the load per core before."""
    if (folder / name / "metrics.jsonl").exists():
        return None
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    command = [sys.executable, "-m", "megatron_matpo", "train", RECIPE, *overrides_of(name)]
    command += [f"run.dir={folder}", f"run.name={name}", f"run.steps={num_steps}"]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}")
    return load


def compare(request: Request, measured_in: Path, steps: range) -> dict[str, float]:
    """Predicted over measured, and both."""
    predicted = simulate(request).outcomes[0]
    lines = [step.metrics for step in read_run(str(measured_in)) if step.step in steps]
    pairs = {
        "step": (predicted.step_s, "time/step_s"),
        "rollout": (predicted.rollout_s, "time/collect_s"),
        "train": (predicted.train_s, "time/train_s"),
    }
    per_token = [line["time/step_s"] / line["tokens/sampled"] for line in lines]
    result = {"spread": max(per_token) / min(per_token)}
    for name, (value, key) in pairs.items():
        measured = statistics.median(line[key] for line in lines)
        result |= {
            f"{name}_predicted_s": value,
            f"{name}_measured_s": measured,
            f"{name}_ratio": value / measured,
        }
    return result


def predict(folder: Path, num_steps: int) -> dict[str, dict[str, float]]:
    """Both predictions."""
    small, middle, large = (folder / name for name in SIZES)
    half = 1 + num_steps // 2
    other = Request(
        RECIPE,
        overrides_of("middle"),
        from_run=(str(small), str(large)),
        fit_steps=(2, num_steps),
        num_steps=4,
    )
    later = Request(
        RECIPE,
        overrides_of("large"),
        from_run=(str(large),),
        fit_steps=(2, half),
        num_steps=4,
    )
    return {
        "other_concurrency": compare(other, middle, range(2, num_steps + 1)),
        "later_steps": compare(later, large, range(half + 1, num_steps + 1)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=5, help="of each run, at least 4")
    parser.add_argument("--keep", default="", help="folder for the runs; those there are used")
    options = parser.parse_args()
    if options.steps < 4:
        parser.error("--steps: at least 4, to learn from some and predict others")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary)
        loads = {name: make_run(name, folder, options.steps) for name in SIZES}
        result = predict(folder, options.steps)
    if options.json:
        ratio = result["other_concurrency"]["step_ratio"]
        said = {"predicted_over_measured": ratio, "load_per_core": loads, **result}
        print(json.dumps(said, indent=2))
        return
    print(f"load per core before each run: {loads}")
    for name, values in result.items():
        print(f"{name} (spread {values['spread']:.2f})")
        for key in ("step", "rollout", "train"):
            print(
                f"  {key:<8} predicted {values[f'{key}_predicted_s']:.3f} s, measured "
                f"{values[f'{key}_measured_s']:.3f} s, ratio {values[f'{key}_ratio']:.2f}"
            )


if __name__ == "__main__":
    main()
