"""Section `eval`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation inside training and by `matpo eval`."""

    sets: list[str] = field(default_factory=list[str])
    """Parquet files, folders, or names of configs in `data.folder`; empty: no evaluation."""
    every: int = 0
    """Training steps between evaluations; 0: none."""
    max_rows: int = 0
    """Rows of each set that are asked, from the first; 0: all."""
    samples_per_row: int = 1
    """Episodes per row. Sets with repeated rows (`..._repeat_8`) count the copies together."""
    confidence: float = 0.95
    """Level of the bootstrap confidence intervals."""
