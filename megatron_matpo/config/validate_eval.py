"""Violations in the section `eval`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_matpo.config.evaluation import TRAIN_SPLIT, set_name
from megatron_matpo.config.root import Config


def check_eval(config: Config) -> Iterator[str]:
    """Violations that the configuration alone shows."""
    seen: dict[str, str] = {}
    for entry in config.eval.sets:
        name = set_name(entry)
        if not name:
            yield f"eval.sets={entry!r}: expected a parquet file, a folder, or the name of a config"
        elif name == TRAIN_SPLIT:
            yield (
                f"eval.sets={entry}: its results would be called {name!r}, which is what the "
                "training questions are called; rename the file or folder"
            )
        elif name in seen:
            yield (
                f"eval.sets={entry}: its results would be called {name!r}, like those of "
                f"{seen[name]}; rename one of them"
            )
        seen.setdefault(name, entry)
