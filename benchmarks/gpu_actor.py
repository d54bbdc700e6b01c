"""Speed, MFU and losses of the actor on one GPU, in bf16 and in FP8; its layers and attention.

    .venv/bin/python benchmarks/gpu_actor.py [--model FOLDER] [--layers N] [--tokens T] [--json]

Takes a published shape (`recipes/models`, no weights needed) with fewer layers, so that it fits one
GPU with its optimizer, starts from seeded random weights, and trains the same rows in every
precision that the device has, and in bf16 with the local layers in place of Transformer Engine's.
Then one attention layer of that shape on a packed row with lengths like MATPO's
(`matpo_lengths.py`, cut to T tokens). Prints tables; with `--json` the last line is one object:

* `device`, `precisions`: what was measured (`bf16 local`: with the local layers);
* per precision `update_s` (median), `tokens_per_s`, `mfu` (of the bf16 peak), `peak_gib`,
  `plan_gib`, `losses`;
* `fp8_speedup`: bf16's time over the fastest FP8 recipe's;
* `fp8_loss_distance`: largest relative distance of an FP8 loss from bf16's at the same update;
* `engine_speedup`: time of an update with the local layers over that with Transformer Engine's;
* `engine_logprob_max`, `engine_logprob_mean`: differences of the two at the initial weights;
* `attention`: per form (`packed`: Transformer Engine's as the model calls it; `alone`, `padded`:
  the same kernel sample by sample, and on a rectangle; `local`: ours) `seconds`, forward and
  backward (median), `speedup` of `packed` over it, and the largest `difference` of the outputs.

Without CUDA it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.matpo_lengths import matpo_step  # noqa: E402
from megatron_matpo.config import Config  # noqa: E402
from megatron_matpo.config.gpus import peak_flops  # noqa: E402
from megatron_matpo.config.hf_model import HfModelConfig  # noqa: E402
from megatron_matpo.config.precision import FP8_RECIPES  # noqa: E402
from megatron_matpo.errors import ConfigError  # noqa: E402
from megatron_matpo.planning.ledger import stage_ledger  # noqa: E402
from megatron_matpo.planning.parameters import total_parameters  # noqa: E402
from megatron_matpo.planning.shape import job_of  # noqa: E402
from tests.helpers import gpu_attention  # noqa: E402
from tests.helpers.gpu_actor import (  # noqa: E402
    gpu_actor,
    gpu_config,
    learnable_batch,
    local_layers,
)
from tests.helpers.gpu_attention import Attention, Heads  # noqa: E402

WARM_UP = 3
MEAN_TOKENS = 10_800
"""Of a trajectory of `matpo_lengths.py`."""


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
        with local_layers():
            if (local := measure(shape, "bf16", "auto", options)) is not None:
                results["bf16 local"] = local
        heads = heads_of(HfModelConfig.from_folder(shape))
    attention = compare_attention(heads, lengths_of(options.tokens), options.updates)
    for name, result in results.items():
        print(
            f"{name:<18}{result['update_s']:>9.3f} s{result['tokens_per_s']:>10.0f} tokens/s"
            f"{100 * (result['mfu'] or 0):>7.1f} % MFU{result['peak_gib']:>8.1f} GiB "
            f"(plan {result['plan_gib']:.1f})   loss {result['losses'][-1]:.4f}"
        )
    for name, form in attention.items():
        print(
            f"attention {name:<8}{1000 * form['seconds']:>9.3f} ms{form['speedup']:>9.2f} x"
            f"   largest difference {form['difference']:.2g}"
        )
    if options.json:
        print(json.dumps({**summary(results), "attention": attention}))
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
            ((logprobs, _),) = actor.score(batches[:1])
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
    top = peak_flops(torch.cuda.get_device_name())
    return {
        "update_s": update_s,
        "tokens_per_s": options.tokens / update_s,
        "mfu": operations / update_s / top if top else None,
        "peak_gib": peak,
        "plan_gib": plan_gib,
        "losses": losses,
        "logprobs": logprobs,
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


def heads_of(hf: HfModelConfig) -> Heads:
    """Of the model's attention layers."""
    return Heads(hf.num_heads, hf.num_kv_heads, hf.head_dim)


def lengths_of(tokens: int) -> list[int]:
    """Lengths like those of a step, shrunk so that about twelve fill a row of so many tokens."""
    drawn = itertools.chain.from_iterable(matpo_step(0, 64))
    lengths: list[int] = []
    for length in drawn:
        lengths.append(max(1, min(length * tokens // (12 * MEAN_TOKENS), tokens - sum(lengths))))
        if sum(lengths) == tokens:
            break
    return lengths


def compare_attention(
    heads: Heads, lengths: Sequence[int], rounds: int
) -> dict[str, dict[str, float]]:
    """The forms of the same attention, in bf16."""
    forms = {
        "packed": gpu_attention.engines(heads),
        "alone": gpu_attention.engines_alone(heads),
        "padded": gpu_attention.engines_padded(heads),
        "local": gpu_attention.ours(heads),
    }
    row, starts = gpu_attention.random_row(heads, lengths), gpu_attention.offsets(lengths)
    outputs = {name: form(*row, starts).detach() for name, form in forms.items()}
    seconds = {name: seconds_of(form, row, starts, rounds) for name, form in forms.items()}
    return {
        name: {
            "seconds": seconds[name],
            "speedup": seconds[name] / seconds["packed"],
            "difference": float((outputs[name] - outputs["packed"]).abs().max()),
        }
        for name in forms
    }


def seconds_of(form: Attention, row: Sequence[Tensor], starts: Tensor, rounds: int) -> float:
    """Median of forward and backward pass."""
    taken: list[float] = []
    for _ in range(WARM_UP + rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.autograd.grad(form(*row, starts).sum(), list(row))
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[WARM_UP:])


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The JSON object."""
    base, local = results.get("bf16"), results.get("bf16 local")
    fp8 = [result for name, result in results.items() if name.startswith("fp8")]
    shown = {
        name: {key: value for key, value in result.items() if key != "logprobs"}
        for name, result in results.items()
    }
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "precisions": shown}
    if base and local:
        distance = (base["logprobs"] - local["logprobs"]).abs()
        found["engine_speedup"] = local["update_s"] / base["update_s"]
        found["engine_logprob_max"] = float(distance.max())
        found["engine_logprob_mean"] = float(distance.mean())
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
