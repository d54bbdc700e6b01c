"""The report, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from megatron_matpo.doctor.lines import Line

_ORDER = {"fail": 0, "warn": 1, "pass": 2, "skipped": 3}
_MAX_NODES = 3


def redact(text: str, secrets: Sequence[str]) -> str:
    """`text` without the values of keys, whoever quotes them."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def without_secrets(lines: Sequence[Line], secrets: Sequence[str]) -> list[Line]:
    """Before they are sent or written: an encoding could hide a value from `redact`."""
    return [
        replace(line, seen=redact(line.seen, secrets), fix=redact(line.fix, secrets))
        for line in lines
    ]


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

    What several nodes say is one line, that of the first.
    """
    shown = _merged([line for line in lines if not is_brief or _is_ill(line)])
    width = max((len(line.name) for line in shown), default=0)
    rows: list[str] = []
    for line in shown:
        node = f"node {line.node}: " if line.node else ""
        rows.append(f"{line.status:7}  {line.name:{width}}  {node}{line.seen}")
        if line.fix and _is_ill(line):
            rows.append(f"{'':7}  {'':{width}}  -> {line.fix}")
    return "\n".join([*rows, summary(lines)]) + "\n"


def _is_ill(line: Line) -> bool:
    return line.status in ("fail", "warn")


def _merged(lines: Sequence[Line]) -> list[Line]:
    """One line for what several nodes say; figures may differ where all is well."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        key = (line.name, line.status, *((line.seen, line.fix) if _is_ill(line) else ()))
        # Without a node: not what several say, but several lines of one check.
        groups.setdefault(key if line.node else (*key, str(id(line))), []).append(line)
    return [
        replace(group[0], node=_nodes([line.node for line in group])) for group in groups.values()
    ]


def _nodes(nodes: list[str]) -> str:
    """`0 (a)`, or `0 (a), 1 (b) and 14 more`."""
    named = list(dict.fromkeys(nodes))
    more = f" and {len(named) - _MAX_NODES} more" if len(named) > _MAX_NODES else ""
    return ", ".join(named[:_MAX_NODES]) + more
