"""Section `eval`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePath

TRAIN_SPLIT = "train"
"""What the manager calls the questions of `data.train`; no evaluation set may have this name."""
_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation inside training and by `matpo eval`."""

    sets: list[str] = field(default_factory=list[str])
    """Parquet files, folders, or names of configs in `data.folder`; empty: no evaluation."""
    every: int = 0
    """Training steps between evaluations; 0: none."""
    before_train: bool = False
    """Evaluate the initial policy too; its metrics are those of step 0."""
    max_rows: int = 0
    """Rows of each set that are asked, from the first; 0: all."""
    samples_per_row: int = 1
    """Episodes per row. Sets with repeated rows (`..._repeat_8`) count the copies together."""
    chunk_rows: int = 64
    """`matpo eval`: rows per request to the manager. A killed evaluation repeats at most the chunks
    that were in flight; `rollout.step_timeout_s` is the deadline of each."""
    chunks_in_flight: int = 2
    """`matpo eval`: chunks asked at the same time, so that one chunk's last episodes do not leave
    the engines idle."""
    confidence: float = 0.95
    """Level of the bootstrap confidence intervals."""
    num_resamples: int = 1000
    """Bootstrap resamples of the questions."""

    @property
    def is_wanted(self) -> bool:
        """Training is to be interrupted by evaluations."""
        return self.every > 0 or self.before_train

    @property
    def named_sets(self) -> dict[str, str]:
        """Name (see `set_name`) -> entry of `sets`, in their order."""
        return {set_name(entry): entry for entry in self.sets}


def set_name(entry: str) -> str:
    """What metrics, files and tables call an entry of `eval.sets`: fit for a file name.

    A path is called by its last part without `.parquet`; the files of MATPO-data are all called
    `train-...`, so such a file is called by its folder.

    Example: `data/gaia/train-00000-of-00001.parquet` -> `gaia`; `my set.parquet` -> `my_set`.
    """
    path = PurePath(entry)
    name = path.name.removesuffix(".parquet")
    if name != path.name and re.fullmatch(r"train(-.*)?", name) and path.parent.name:
        name = path.parent.name
    return _UNFIT.sub("_", name).strip("._-")
