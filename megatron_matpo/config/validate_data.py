"""Settings of the section `data` that are allowed but probably not meant.

What is wrong with a data set itself needs its files: `launch.preflight`, `matpo data check`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_matpo.config.root import Config

_EVALUATION = re.compile(r"\b(matpo|single_agent)_val_")


def warn_data(config: Config) -> Iterator[str]:
    """Training on questions that results are reported for."""
    train = config.data.train
    if _EVALUATION.search(train):
        yield f"data.train={train}: is an evaluation set of MATPO-data"
    elif train and train in config.eval.sets:
        yield f"data.train={train}: is in eval.sets too, so that results are of known questions"
