"""Chooses recorded conversations for the report, so that the page stays small.

A few steps (first, last, evenly between), in each step episodes over the whole range of rewards,
long texts cut, equal texts (the prompts of a group) stored once. The result is plain JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

MAX_STEPS = 8
MAX_EPISODES_PER_STEP = 24
MAX_TURN_CHARS = 12_000
MAX_TOTAL_BYTES = 3_500_000
"""Of text, before the page around it; the page is promised to be below 5 MB."""
MAX_READ_BYTES = 48 * 2**20
"""Per step file: the trainer waits for the report."""

_PAGE_FULL = "[not shown: the page is full; the text is in the run's rollouts folder]"
_FILE = re.compile(r"step_(\d+)\.jsonl$")
_Item = TypeVar("_Item")


@dataclass
class _Texts:
    """Texts of the page, each once, and how much they take."""

    items: list[str] = field(default_factory=list)
    num_bytes: int = 0
    _index: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> int:
        """Index of `text`, cut if it is too long, or replaced if the page is full."""
        if self.num_bytes > MAX_TOTAL_BYTES and text not in self._index:
            text = _PAGE_FULL
        if len(text) > MAX_TURN_CHARS:
            half = MAX_TURN_CHARS // 2
            left_out = len(text) - 2 * half
            text = f"{text[:half]}\n[... {left_out} characters are not shown ...]\n{text[-half:]}"
        if text not in self._index:
            self._index[text] = len(self.items)
            self.items.append(text)
            # As JSON, because control characters and quotes grow there.
            self.num_bytes += len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace"))
            self.num_bytes += 5 * sum(text.count(character) for character in "<>&")
        return self._index[text]


def read_conversations(folder: Path) -> dict[str, Any]:
    """`{"texts": [...], "steps": [{"step", "num_episodes", "episodes"}]}` of `step_N.jsonl`.

    Damaged lines and files are left out.
    """
    found = (
        (int(match.group(1)), path)
        for path in folder.glob("step_*.jsonl")
        if (match := _FILE.match(path.name))
    )
    chosen = spread(sorted(found), MAX_STEPS)
    texts = _Texts()
    steps: list[dict[str, Any]] = []
    for number, (step, path) in enumerate(chosen, 1):
        episodes = _read_episodes(path)
        ranked = sorted(episodes, key=_rank)
        budget = MAX_TOTAL_BYTES * number // len(chosen)
        shown: list[dict[str, Any]] = []
        for episode in spread(ranked, MAX_EPISODES_PER_STEP):
            if texts.num_bytes > budget:
                break
            shown.append(_episode(episode, texts))
        if shown:
            steps.append({"step": step, "num_episodes": len(episodes), "episodes": shown})
    return {"texts": texts.items, "steps": steps}


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most `count` items, evenly over the sequence, first and last included."""
    if len(items) <= count:
        return list(items)
    stride = (len(items) - 1) / (count - 1)
    return [items[round(index * stride)] for index in range(count)]


def _read_episodes(path: Path) -> list[list[dict[str, Any]]]:
    """Trajectories by episode, planner first."""
    episodes: dict[str, list[dict[str, Any]]] = {}
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    episodes.setdefault(record["episode_id"], []).append(record)
                except (ValueError, KeyError, TypeError):
                    continue
                if file.tell() > MAX_READ_BYTES:
                    break
    except OSError:
        return []
    # A file that was cut short may lack the planner of its last episode.
    return [records for records in episodes.values() if records[0].get("role") == "planner"]


def _rank(records: Sequence[Mapping[str, Any]]) -> tuple[bool, float, str]:
    """Highest reward first, episodes without one last."""
    score = _number(records[0].get("score"))
    return score is None, -(score or 0.0), str(records[0]["episode_id"])


def _number(value: Any) -> float | None:
    """The page's JSON takes no NaN, but a recorded line may hold one."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _episode(records: Sequence[dict[str, Any]], texts: _Texts) -> dict[str, Any]:
    planner, workers = records[0], records[1:]
    kept = ("question", "ground_truth", "answer", "failure")
    return {
        **{name: texts.add(str(planner.get(name) or "")) for name in kept},
        "id": planner["episode_id"],
        "sample": _number(planner.get("sample_index")),
        "source": planner.get("data_source"),
        "total": _number(planner.get("score")),
        "accuracy": _number(planner.get("accuracy_reward")),
        "advantage": _number(planner.get("advantage")),
        "duration_s": _number(planner.get("duration_s")),
        "planner": _trajectory(planner, texts),
        "workers": [_trajectory(worker, texts) for worker in workers],
    }


def _trajectory(record: Mapping[str, Any], texts: _Texts) -> dict[str, Any]:
    return {
        "agent": record.get("agent"),
        "role": record.get("role"),
        "spawn_turn": record.get("spawn_turn"),
        "status": record.get("status"),
        "format": _number(record.get("tool_format_reward")),
        "error": texts.add(str(record.get("error") or "")),
        "subtask": texts.add(str(record.get("subtask") or "")),
        "versions": record.get("policy_versions"),
        "turns": [
            [turn.get("kind"), texts.add(str(turn.get("text", ""))), turn.get("num_tokens")]
            for turn in record.get("turns", [])
        ],
    }
