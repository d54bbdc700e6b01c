"""The report, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from megatron_matpo.doctor.lines import Line

_ORDER = {"fail": 0, "warn": 1, "pass": 2, "skipped": 3}


def redact(text: str, secrets: Sequence[str]) -> str:
    """`text` without the values of keys, whoever quotes them."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def as_json(lines: Sequence[Line]) -> str:
    """A list of objects: name, status, seen, fix, node."""
    return json.dumps([asdict(line) for line in lines], indent=2) + "\n"


def summary(lines: Sequence[Line]) -> str:
    """One line: how many of each."""
    counts = {status: sum(line.status == status for line in lines) for status in _ORDER}
    words = [
        f"{counts['pass']} passed",
        *([f"{counts['warn']} warnings"] if counts["warn"] else []),
        *([f"{counts['fail']} FAILED"] if counts["fail"] else []),
        *([f"{counts['skipped']} skipped"] if counts["skipped"] else []),
    ]
    return f"doctor: {', '.join(words)}"


def as_text(lines: Sequence[Line], *, is_brief: bool) -> str:
    """Lines as columns, then the summary; `is_brief` leaves out those that are well.

    What passes on several nodes is one line, that of the first node.
    """
    shown = (
        [line for line in lines if line.status in ("fail", "warn")] if is_brief else _merged(lines)
    )
    width = max((len(line.name) for line in shown), default=0)
    rows: list[str] = []
    for line in shown:
        node = f"node {line.node}: " if line.node else ""
        rows.append(f"{line.status:7}  {line.name:{width}}  {node}{line.seen}")
        if line.fix and line.status in ("fail", "warn"):
            rows.append(f"{'':7}  {'':{width}}  -> {line.fix}")
    return "\n".join([*rows, summary(lines)]) + "\n"


def _merged(lines: Sequence[Line]) -> list[Line]:
    """One line for each check that passes on several nodes; all others as they are."""
    merged: list[Line] = []
    firsts: dict[str, int] = {}
    num_more: dict[str, int] = {}
    for line in lines:
        is_well = line.status not in ("fail", "warn") and line.node != ""
        if is_well and line.name in firsts:
            num_more[line.name] = num_more.get(line.name, 0) + 1
            continue
        if is_well:
            firsts[line.name] = len(merged)
        merged.append(line)
    for name, count in num_more.items():
        first = merged[firsts[name]]
        merged[firsts[name]] = Line(
            name, first.status, f"{first.seen} (and {count} more nodes)", node=first.node
        )
    return merged
