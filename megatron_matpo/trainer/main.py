"""Entry of a training rank: `python -m megatron_matpo.trainer.main --run-dir RUN`."""

from __future__ import annotations

from pathlib import Path

from megatron_matpo.config import Config
from megatron_matpo.trainer.build import build_run
from megatron_matpo.trainer.clock import Clock
from megatron_matpo.trainer.loop import train
from megatron_matpo.trainer.process import run_rank


def work(config: Config, run_dir: Path, clock: Clock) -> None:
    """Wire the run and train."""
    train(build_run(config, run_dir, clock))


if __name__ == "__main__":
    run_rank(work)
