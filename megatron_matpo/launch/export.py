"""`matpo export`: which checkpoint, and where to; the work is another process's, with torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_matpo import checkpoint_files as files
from megatron_matpo.errors import CheckpointError, ConfigError

CHECKPOINTS = "checkpoints"
_WORKER = "megatron_matpo.megatron.export"


@dataclass(frozen=True)
class ExportRequest:
    """The command line of `matpo export`."""

    source: str
    """A run's folder, its `checkpoints` folder, or a `step_N` folder."""
    step: int | None = None
    """Which checkpoint of a run; None: the latest."""
    out: str = ""
    """Empty: `hf_step_N` beside the checkpoint."""
    dtype: str = ""
    """`bf16 | fp32`; empty: as it was trained."""
    model: str = ""
    """Folder that config.json and tokenizer come from; empty: `model.path` of the run."""
    force: bool = False
    """Replace an existing folder."""


def export(request: ExportRequest) -> int:
    """Write a Hugging Face folder; returns the exit code.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: the output folder exists already.
    """
    checkpoint = find_checkpoint(request.source, request.step)
    out = Path(request.out) if request.out else checkpoint.with_name(f"hf_{checkpoint.name}")
    if out.exists() and not request.force:
        raise ConfigError(f"{out} exists already; choose another --out, or replace it with --force")
    command = [sys.executable, "-m", _WORKER, str(checkpoint), str(out)]
    command += ["--dtype", request.dtype] if request.dtype else []
    command += ["--model", request.model] if request.model else []
    return subprocess.run(command, check=False).returncode


def find_checkpoint(source: str, step: int | None = None) -> Path:
    """The checkpoint's folder.

    Raises:
        CheckpointError: there is none, with those that there are.
    """
    folder = Path(source)
    if (folder / files.MANIFEST).is_file():
        if step is not None:
            raise CheckpointError(f"{source} is a checkpoint; --step={step} is for a run's folder")
        return folder
    root = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    steps = files.complete_steps(root)
    wanted = step if step is not None else files.latest_step(root)
    if wanted is None or wanted not in steps:
        there = ", ".join(f"step_{one}" for one in steps) or "none"
        what = "latest checkpoint" if wanted is None else f"checkpoint step_{wanted}"
        raise CheckpointError(f"{root}: no {what}; complete ones: {there}")
    return files.step_folder(root, wanted)
