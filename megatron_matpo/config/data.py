"""Section `data`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """Questions, in the parquet schema of MATPO-data."""

    folder: str = ""
    """Where configs of MATPO-data are looked up by name, as in FOLDER/matpo_train_musique."""
    train: str = ""
    """Parquet file, a folder of them, or the name of a config in `data.folder`."""
    prompts_per_step: int = 8
    samples_per_prompt: int = 8
    """Episodes per question: the GRPO group."""
