"""Builders of evaluation results."""

from __future__ import annotations

from typing import Any

from megatron_matpo.evaluation.results import EpisodeResult


def result(
    row: int = 0, sample: int = 0, accuracy: float | None = 1.0, **values: Any
) -> EpisodeResult:
    """One episode; `accuracy` None means that it failed outside the model."""
    fields: dict[str, Any] = {
        "question_key": f"q{row}",
        "data_source": "world",
        "level": "",
        "question_type": "",
        "format": None if accuracy is None else 1.0,
        "answer": "Ada",
        "failure": "" if accuracy is not None else "tool_failure: gone",
        "status": "answered" if accuracy is not None else "tool_failure",
        "worker_statuses": {},
        "context_tokens": 100,
        "sampled_tokens": 10,
        "duration_s": 1.0,
    }
    return EpisodeResult(row=row, sample=sample, accuracy=accuracy, **(fields | values))
