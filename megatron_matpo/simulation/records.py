"""Recorded episodes: `RUN/rollouts/step_N.jsonl` as trees, `RUN/metrics.jsonl` as numbers.

Episodes that failed outside the model are left out, as the trainer leaves them out. A call's
recorded duration includes its wait for a free place at the tool server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_matpo.errors import ConfigError
from megatron_matpo.simulation.episodes import Agent, Turn

_STEP = re.compile(r"step_(\d+)\.jsonl")


@dataclass(frozen=True)
class RecordedEpisode:
    """One episode, and how long it took."""

    planner: Agent
    duration_s: float


@dataclass(frozen=True)
class RecordedStep:
    """One line of the metrics with the episodes of its step."""

    step: int
    episodes: tuple[RecordedEpisode, ...]
    metrics: dict[str, float]


def read_episodes(path: str) -> list[RecordedEpisode]:
    """All episodes of a `step_N.jsonl` file, or of all those of a run's folder.

    Raises:
        ConfigError: nothing is there, or what is there is no recording.
    """
    files = [Path(path)] if Path(path).is_file() else list(_files(Path(path)).values())
    if not files:
        raise ConfigError(
            f"--lengths={path}: expected a run's folder with rollouts/step_N.jsonl "
            "(obs.record_rollouts), one such file, or a YAML file of distributions"
        )
    found = [episode for file in files for episode in _read_file(file)]
    if not found:
        raise ConfigError(f"--lengths={path}: no episode in it ended without a failure")
    return found


def read_run(run_dir: str) -> list[RecordedStep]:
    """Every step of a run that has both a line of metrics and a recording, in order.

    Raises:
        ConfigError: the folder is no run's, or recorded nothing.
    """
    folder = Path(run_dir)
    metrics_file = folder / "metrics.jsonl"
    if not metrics_file.is_file():
        raise ConfigError(f"--from-run={run_dir}: no run's folder: it has no metrics.jsonl")
    files = _files(folder)
    steps: list[RecordedStep] = []
    for line in _lines(metrics_file):
        step = int(line.get("step", 0))
        if step in files:
            steps.append(RecordedStep(step, tuple(_read_file(files[step])), line))
    if not steps:
        raise ConfigError(
            f"--from-run={run_dir}: no step has a recording in rollouts/ (obs.record_rollouts)"
        )
    return steps


def _files(folder: Path) -> dict[int, Path]:
    """Recordings by step."""
    numbered = [(_STEP.fullmatch(file.name), file) for file in folder.glob("rollouts/*.jsonl")]
    return dict(sorted((int(match[1]), file) for match, file in numbered if match))


def _lines(file: Path) -> Iterable[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: expected one JSON object per line ({error})") from error


def _read_file(file: Path) -> list[RecordedEpisode]:
    episodes: dict[str, list[dict[str, Any]]] = {}
    try:
        for line in _lines(file):
            if not line["failure"]:
                episodes.setdefault(line["episode_id"], []).append(line)
        return [_episode(lines) for lines in episodes.values()]
    except (KeyError, TypeError) as error:
        problem = f"{file}: not a recording of this version: {error!r} is missing"
        raise ConfigError(problem) from error


def _episode(lines: list[dict[str, Any]]) -> RecordedEpisode:
    workers = {
        line["trajectory_id"]: _agent(line, {}) for line in lines if line["role"] == "worker"
    }
    (planner,) = [line for line in lines if line["role"] == "planner"]
    return RecordedEpisode(_agent(planner, workers), float(planner["duration_s"]))


def _agent(line: dict[str, Any], workers: dict[str, Agent]) -> Agent:
    raw: list[dict[str, Any]] = line["turns"]
    calls: dict[int, list[dict[str, Any]]] = {}
    for call in line["calls"]:
        calls.setdefault(call["turn_index"], []).append(call)
    turns: list[Turn] = []
    for index, item in enumerate(raw):
        if item["kind"] != "model":
            continue
        after = raw[index + 1] if index + 1 < len(raw) else None
        own = calls.get(index, [])
        turns.append(
            Turn(
                num_tokens=max(1, int(item["num_tokens"])),
                # Calls that were not executed took no time.
                tools_s=tuple(
                    float(c["duration_s"]) for c in own if not c["worker_id"] and c["duration_s"]
                ),
                workers=tuple(workers[c["worker_id"]] for c in own if c["worker_id"]),
                reply_tokens=int(after["num_tokens"]) if after else 0,
            )
        )
    if not turns:
        turns = [Turn(1)]  # the prompt alone filled the context
    return Agent(max(1, int(raw[0]["num_tokens"])), tuple(turns))
