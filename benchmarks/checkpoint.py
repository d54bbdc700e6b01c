"""How long a checkpoint keeps the training from going on: written at once, and in the background.

    python benchmarks/checkpoint.py --json

One rank on the CPU; a model of --layers layers of width --hidden with random weights (the default
has 50 million parameters: 200 MB of weights, 600 MB of optimizer state, all in fp32). Per kind of
save, the time that `save`, `poll_save` and `finish_save` take (`blocked_s`), with as many training
steps between them as it takes until the files are written, and how much longer a step takes while
the writer works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_matpo.checkpoint_files import read_manifest
from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.run import CheckpointConfig
from megatron_matpo.config.train import ModelConfig, TrainConfig
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.parallel import destroy_parallel, init_parallel
from tests.helpers.dist import free_port
from tests.helpers.tiny import make_batch, weighted_loss

BATCH = make_batch((2, 64), 0)


def write_model(folder: Path, hidden: int, layers: int) -> None:
    """config.json of a Qwen3 whose weights nobody needs."""
    folder.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "vocab_size": 1024,
        "max_position_embeddings": 256,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))


def timed(action: Any) -> float:
    """Seconds that `action` takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(config: Config, state: Any, folder: Path, saves: int) -> dict[str, float]:
    """Medians over `saves` checkpoints of one kind."""
    actor = MegatronActor(config, HfModelConfig.from_folder(config.model.path), state)
    actor.load_initial()
    update = 0

    def step() -> None:
        nonlocal update
        actor.update([BATCH], weighted_loss, update)
        update += 1

    step()
    alone = statistics.median(timed(step) for _ in range(5))
    blocked, meanwhile = [], []
    for number in range(1, saves + 1):
        spent = timed(lambda n=number: actor.save(folder, n, {}))
        while actor._checkpoints._writer._pending is not None:
            meanwhile.append(timed(step))
            spent += timed(actor.poll_save)
        blocked.append(spent + timed(actor.finish_save))
    (newest,) = folder.glob(f"step_{saves}")
    return {
        "blocked_s": statistics.median(blocked),
        "step_s": alone,
        "step_while_writing_s": statistics.median(meanwhile) if meanwhile else float("nan"),
        "steps_while_writing": len(meanwhile) / saves,
        "checkpoint_mb": sum(e.num_bytes for e in read_manifest(newest).values()) / 1e6,
    }


def main() -> None:
    """Measure both kinds and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        write_model(root / "model", options.hidden, options.layers)
        config = Config(
            model=ModelConfig(path=str(root / "model"), random_init=True),
            train=TrainConfig(timeout_s=600.0),
        )
        state = init_parallel(config, rank=0, world_size=1, master_port=free_port())
        result = {}
        for kind, asynchronous in (("sync", False), ("async", True)):
            section = CheckpointConfig(keep_last=1, asynchronous=asynchronous)
            kept = replace(config, checkpoint=section)
            result[kind] = measure(kept, state, root / kind, options.saves)
        destroy_parallel()
    result["blocked_frac"] = result["async"]["blocked_s"] / result["sync"]["blocked_s"]
    if options.json:
        print(json.dumps(result))
        return
    for kind in ("sync", "async"):
        print(kind, {key: round(value, 4) for key, value in result[kind].items()})
    print(f"async blocks {100 * result['blocked_frac']:.1f} % as long")


if __name__ == "__main__":
    main()
