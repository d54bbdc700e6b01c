"""`RUN/eval/results.md` and `RUN/eval/results.json` from the results that are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_matpo.config.root import Config
from megatron_matpo.evaluation.asked import EvalSet
from megatron_matpo.evaluation.inputs import FOLDER, read_inputs
from megatron_matpo.evaluation.summary import summarize
from megatron_matpo.evaluation.table import Report, to_json, to_text
from megatron_matpo.obs.files import write_atomic

TEXT_FILE = "results.md"
JSON_FILE = "results.json"


def write_report(config: Config, run_dir: Path, sets: Sequence[EvalSet]) -> None:
    """Write both files; every set has at least one result.

    Raises:
        OSError: they cannot be written.
    """
    inputs = read_inputs(run_dir)
    report = Report(
        title=f"{config.model.path} ({config.run.name})",
        confidence=config.eval.confidence,
        summaries=[
            summarize(item.name, item.wanted_results(), config.eval, config.run.seed)
            for item in sets
        ],
        has_mixed_settings=inputs is not None and inputs.has_mixed_settings,
    )
    write_atomic(run_dir / FOLDER / JSON_FILE, to_json(report))
    write_atomic(run_dir / FOLDER / TEXT_FILE, to_text(report))
