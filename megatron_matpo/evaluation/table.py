"""Summaries as text (Markdown that is readable on a terminal) and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_matpo.evaluation.paper import SOURCE, PaperScore, paper_score
from megatron_matpo.evaluation.stats import Estimate
from megatron_matpo.evaluation.summary import SetSummary

_MAX_FAILURES = 3
_MAX_FAILURE_CHARS = 160


@dataclass(frozen=True, slots=True)
class Report:
    """What one evaluation found."""

    title: str
    """What was evaluated: model and recipe."""
    confidence: float
    summaries: Sequence[SetSummary]
    has_mixed_settings: bool
    """Results of other settings were kept by the user's word (`--accept-changes`)."""

    @property
    def num_missing(self) -> int:
        """Episodes without a verdict, over all sets."""
        return sum(summary.num_missing for summary in self.summaries)


def to_text(report: Report) -> str:
    """The whole report; figures in percent."""
    lines = [f"# Evaluation of {report.title}", "", *_headline(report)]
    if report.has_mixed_settings:
        lines += ["", "Part of the results was made with other settings (--accept-changes)."]
    if report.num_missing:
        lines += [
            "",
            f"{report.num_missing} episodes are missing: they failed for reasons outside the model "
            "and count nowhere; the same command asks them again.",
        ]
    for summary in report.summaries:
        lines += ["", f"## {summary.name}", "", *_section(summary, report.confidence)]
    return "\n".join(lines) + "\n"


def to_json(report: Report) -> str:
    """The same figures as fractions, unrounded; NaN as null."""
    sets: dict[str, Any] = {}
    for summary in report.summaries:
        score = paper_score(summary.name, summary.data_sources)
        paper = None if score is None else asdict(score) | {"source": SOURCE, "unit": "percent"}
        sets[summary.name] = asdict(summary) | {"mean": summary.mean_label, "paper": paper}
    content = {
        "title": report.title,
        "confidence": report.confidence,
        "num_missing": report.num_missing,
        "has_mixed_settings": report.has_mixed_settings,
        "sets": sets,
    }
    return json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n"


def _headline(report: Report) -> list[str]:
    """One row per set, the paper's figures beside ours where it has any."""
    interval = f"{100 * report.confidence:g}% interval"
    head = ["set", "measure", "ours", interval, "questions", "episodes"]
    scores = [paper_score(item.name, item.data_sources) for item in report.summaries]
    has_paper = any(scores)
    if has_paper:
        head += ["MATPO (theirs)", "delta", "single agent (theirs)", "delta"]
    rows: list[list[str]] = []
    for summary, score in zip(report.summaries, scores, strict=True):
        mean = summary.mean
        num_scored = summary.num_episodes - summary.num_missing
        row = [summary.name, summary.mean_label, _percent(mean.value), _interval(mean)]
        row += [str(mean.num_questions), f"{num_scored}/{summary.num_episodes}"]
        if has_paper:
            row += _paper_cells(summary, score)
        rows.append(row)
    lines = _grid(head, rows)
    if has_paper:
        lines += [
            "",
            f"Columns marked theirs are the published figures ({SOURCE}), not measured here.",
        ]
        lines += [
            note
            for summary, score in zip(report.summaries, scores, strict=True)
            if score is not None and (note := _paper_note(summary, score))
        ]
    return lines


def _paper_cells(summary: SetSummary, score: PaperScore | None) -> list[str]:
    if score is None:
        return ["", "", "", ""]
    ours = 100 * summary.mean.value
    cells: list[str] = []
    for theirs in (score.matpo, score.single_agent):
        cells += [f"{theirs:.2f}", "-" if math.isnan(ours) else f"{ours - theirs:+.2f}"]
    return cells


def _paper_note(summary: SetSummary, score: PaperScore) -> str:
    """How ours is another measurement than theirs; empty if it is not known to be."""
    parts: list[str] = []
    if summary.num_questions != score.num_questions:
        parts.append(f"{summary.num_questions} questions here, {score.num_questions} there")
    if summary.num_samples != score.num_samples:
        parts.append(f"{summary.mean_label} here, mean@{score.num_samples} there")
    if not parts:
        return ""
    return f"{summary.name} is not the paper's {score.benchmark} measurement: {'; '.join(parts)}."


def _section(summary: SetSummary, confidence: float) -> list[str]:
    interval = f"{100 * confidence:g}% interval"
    head = ["measure", "value", interval, "questions"]
    rows = [[label, *_cells(item)] for label, item in summary.measures.items()]
    lines = _grid(head, rows)
    for name, values in summary.breakdowns.items():
        rows = [[value, *_cells(item)] for value, item in values.items()]
        lines += ["", *_grid([name, summary.mean_label, interval, "questions"], rows)]
    lines += ["", f"planner: {_shares(summary.planner_statuses)}"]
    if summary.worker_statuses:
        lines.append(f"workers: {_shares(summary.worker_statuses)}")
    lines.append(
        f"per episode: {summary.workers:.2f} workers, {summary.context_tokens:.0f} tokens of "
        f"context, {summary.sampled_tokens:.0f} sampled, {summary.duration_s:.1f} s; answer found "
        f"in {_percent(summary.answered)}%, format {_percent(summary.format)}%"
    )
    if summary.num_missing:
        lines.append(f"missing: {summary.num_missing} of {summary.num_episodes} episodes")
        shown = list(summary.failures.items())[:_MAX_FAILURES]
        lines += [f"  {count} x {reason[:_MAX_FAILURE_CHARS]}" for reason, count in shown]
    return lines


def _cells(item: Estimate) -> list[str]:
    return [_percent(item.value), _interval(item), str(item.num_questions)]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def _interval(item: Estimate) -> str:
    if item.num_questions < 2:
        return "-"
    return f"{_percent(item.low)} to {_percent(item.high)}"


def _shares(shares: dict[str, float]) -> str:
    return (
        ", ".join(f"{name} {_percent(share)}%" for name, share in shares.items()) or "none scored"
    )


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table with aligned columns; the first column is left-aligned."""
    table = [list(head), *(list(row) for row in rows)]
    table = [[cell.replace("|", "/") for cell in row] for row in table]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = [
        ("-" * width) if i == 0 else ("-" * (width - 1) + ":") for i, width in enumerate(widths)
    ]
    return [line(table[0]), line(rule), *(line(row) for row in table[1:])]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
