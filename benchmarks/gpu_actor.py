"""Speed, MFU and losses of the actor on one GPU, in bf16 and in FP8.

    .venv/bin/python benchmarks/gpu_actor.py [--model FOLDER] [--layers N] [--tokens T] [--json]

Takes a published shape (`recipes/models`, no weights needed) with fewer layers, so that it fits one
GPU with its optimizer, starts from seeded random weights, and trains the same rows in every
precision that the device has. Prints a table; with `--json` the last line is one object:

* `device`, `precisions`: what was measured;
* per precision `update_s` (median), `tokens_per_s`, `mfu` (of the bf16 peak), `peak_gib`,
  `plan_gib`, `losses`;
* `fp8_speedup`: bf16's time over the fastest FP8 recipe's;
* `fp8_loss_distance`: largest relative distance of an FP8 loss from bf16's at the same update.

Without CUDA it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_matpo.config import Config  # noqa: E402
from megatron_matpo.config.gpus import GPUS  # noqa: E402
from megatron_matpo.config.hf_model import HfModelConfig  # noqa: E402
from megatron_matpo.config.precision import FP8_RECIPES  # noqa: E402
from megatron_matpo.errors import ConfigError  # noqa: E402
from megatron_matpo.planning.ledger import stage_ledger  # noqa: E402
from megatron_matpo.planning.parameters import total_parameters  # noqa: E402
from megatron_matpo.planning.shape import job_of  # noqa: E402

WARM_UP = 3


def main() -> int:
    """Measure what the device has."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "recipes" / "models" / "qwen3-4b"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu_actor.py needs a CUDA device; this machine has none", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        shape = shorten(Path(options.model), Path(folder), options.layers)
        results = {
            name: result
            for name, (precision, recipe) in choices().items()
            if (result := measure(shape, precision, recipe, options)) is not None
        }
    for name, result in results.items():
        print(
            f"{name:<18}{result['update_s']:>9.3f} s{result['tokens_per_s']:>10.0f} tokens/s"
            f"{100 * (result['mfu'] or 0):>7.1f} % MFU{result['peak_gib']:>8.1f} GiB "
            f"(plan {result['plan_gib']:.1f})   loss {result['losses'][-1]:.4f}"
        )
    if options.json:
        print(json.dumps(summary(results)))
    return 0


def choices() -> dict[str, tuple[str, str]]:
    """Name -> (precision, FP8 recipe)."""
    return {"bf16": ("bf16", "auto")} | {f"fp8 {name}": ("fp8", name) for name in FP8_RECIPES}


def shorten(model: Path, folder: Path, layers: int) -> Path:
    """A copy of the shape with fewer layers."""
    shutil.copy(model / "config.json", folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": layers}))
    return folder


def measure(
    folder: Path, precision: str, recipe: str, options: argparse.Namespace
) -> dict[str, Any] | None:
    """One precision; None if the device does not have it."""
    from tests.helpers.gpu_actor import gpu_actor, gpu_config, learnable_batch

    config = gpu_config(folder, precision, recipe, micro_batch_tokens=options.tokens)
    config = replace(
        config,
        model=replace(config.model, random_init=True),
        rollout=replace(config.rollout, context_length=options.tokens),
    )
    losses: list[float] = []
    seconds: list[float] = []

    def loss_fn(logprobs: Any, entropy: Any, batch: Any) -> Any:
        return -(logprobs * batch.loss_mask).sum() / options.tokens, {}

    try:
        with gpu_actor(config) as actor:
            batches = [learnable_batch(options.tokens, seed) for seed in range(options.updates)]
            torch.cuda.reset_peak_memory_stats()
            for index, batch in enumerate(batches):
                torch.cuda.synchronize()
                started = time.perf_counter()
                losses.append(actor.update([batch], loss_fn, index).loss)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            peak = torch.cuda.max_memory_allocated() / 2**30
    except ConfigError as error:
        print(f"{precision} {recipe}: left out: {error}", file=sys.stderr)
        return None
    update_s = statistics.median(seconds[WARM_UP:])
    operations, plan_gib = reckoned(config, options.tokens)
    top = peak_operations()
    return {
        "update_s": update_s,
        "tokens_per_s": options.tokens / update_s,
        "mfu": operations / update_s / top if top else None,
        "peak_gib": peak,
        "plan_gib": plan_gib,
        "losses": losses,
    }


def reckoned(config: Config, tokens: int) -> tuple[float, float]:
    """Operations of an update (see `planning/layouts.py`), and the plan's peak in GiB."""
    hf = HfModelConfig.from_folder(config.model.path)
    job = job_of(config, hf)
    embedding = 0 if hf.tie_word_embeddings else hf.vocab_size * hf.hidden_size
    matmul = 6.0 * (total_parameters(job) - embedding) * tokens
    attention = 6.0 * hf.num_layers * hf.num_heads * hf.head_dim * tokens * tokens
    ledger = stage_ledger(job, 0, 1)
    return matmul + attention, (ledger.total - ledger.reserve) / 2**30


def peak_operations() -> float:
    """Of this GPU in bf16, per second; 0 if the table lacks it."""
    name = torch.cuda.get_device_name()
    known = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in name]
    return known[0].bf16_tflops * 1e12 if known else 0.0


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The JSON object."""
    base = results.get("bf16")
    fp8 = [result for name, result in results.items() if name != "bf16"]
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "precisions": results}
    if base and fp8:
        found["fp8_speedup"] = base["update_s"] / min(result["update_s"] for result in fp8)
        found["fp8_loss_distance"] = max(
            abs(mine - other) / abs(other)
            for result in fp8
            for mine, other in zip(result["losses"], base["losses"], strict=True)
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
