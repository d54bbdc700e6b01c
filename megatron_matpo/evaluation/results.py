"""What an evaluation knows of each episode, and the append-only file that holds it.

Invariants:

* one line per finished episode; of several lines for one (row, sample) the last one counts;
* a line is complete or not there: a chunk is appended by one write and synced, and a last line that
  a crash cut short is removed before anything is appended;
* an episode that failed for reasons outside the model has no accuracy: it is missing, never wrong.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_matpo.errors import DataError
from megatron_matpo.types import Episode, Group, RolloutBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeResult:
    """One sample of one row."""

    row: int
    """Row of the set, from 0."""
    sample: int
    """Which of the row's samples, from 0."""
    row_hash: str = ""
    """Of the row's texts (`evaluation.inputs.row_hash`); empty inside training."""
    question_key: str
    """Rows with equal keys are copies of one question."""
    data_source: str
    level: str
    question_type: str
    accuracy: float | None
    """The grader's verdict in [0, 1]; None: the episode failed for reasons outside the model."""
    format: float | None
    answer: str
    """As extracted; empty if there was none."""
    failure: str
    status: str
    """How the planner ended."""
    worker_statuses: dict[str, int]
    """Number of workers by how they ended."""
    context_tokens: int
    """Lengths of all contexts of the episode."""
    sampled_tokens: int
    duration_s: float

    @property
    def num_workers(self) -> int:
        """Worker trajectories."""
        return sum(self.worker_statuses.values())


def episode_results(batch: RolloutBatch, hashes: Sequence[str] = ()) -> list[EpisodeResult]:
    """The results of all episodes of `batch`; `hashes` are those of the set's rows."""
    return [
        _result(group, episode, hashes[group.row_index] if hashes else "")
        for group in batch.groups
        for episode in group.episodes
    ]


def _result(group: Group, episode: Episode, row_hash: str) -> EpisodeResult:
    reward, trajectories = episode.reward, episode.trajectories
    return EpisodeResult(
        row=group.row_index,
        sample=episode.sample_index,
        row_hash=row_hash,
        question_key=group.question_key,
        data_source=group.data_source,
        level=group.level,
        question_type=group.question_type,
        accuracy=None if reward is None else reward.accuracy,
        format=None if reward is None else reward.format,
        answer=episode.answer,
        failure=episode.failure,
        status=episode.planner.status.value,
        worker_statuses=dict(Counter(item.status.value for item in episode.workers)),
        context_tokens=sum(item.num_tokens for item in trajectories),
        sampled_tokens=sum(item.num_sampled_tokens for item in trajectories),
        duration_s=round(episode.duration_s, 3),
    )


def number_samples(batch: RolloutBatch, samples: Mapping[int, Sequence[int]]) -> RolloutBatch:
    """`batch` with the samples of each row numbered as `samples[row]` says.

    The manager numbers what one request asks from 0; a resumed evaluation asks for single samples.
    """
    groups: list[Group] = []
    for group in batch.groups:
        numbers = samples[group.row_index]
        episodes = tuple(
            replace(episode, sample_index=number)
            for episode, number in zip(group.episodes, numbers, strict=True)
        )
        groups.append(replace(group, episodes=episodes))
    return replace(batch, groups=tuple(groups))


class ResultsFile:
    """`RUN/eval/SET/results.jsonl`; one writer at a time (the run folder has one supervisor)."""

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            DataError: a line in the middle is not a result; names file and line.
        """
        self.path = path
        self._results: dict[tuple[int, int], EpisodeResult] = {}
        if not path.exists():
            return
        data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if len(complete) < len(data):
            os.truncate(path, len(complete))
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                self._keep(EpisodeResult(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{path}: line {number}: not a result of this version ({error}); choose "
                    "another run.name"
                ) from error

    @property
    def results(self) -> list[EpisodeResult]:
        """The last line of each (row, sample), in their order."""
        return [self._results[key] for key in sorted(self._results)]

    def append(self, results: Iterable[EpisodeResult]) -> None:
        """Add lines; on return they are on disk.

        Raises:
            OSError: the disk refuses them.
        """
        added = list(results)
        lines = [json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in added]
        data = "".join(lines).encode("utf-8", "replace")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(descriptor, data)
            if written != len(data):
                raise OSError(
                    f"{self.path}: wrote {written} of {len(data)} bytes; is the disk full?"
                )
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        for item in added:
            self._keep(item)

    def _keep(self, result: EpisodeResult) -> None:
        self._results[result.row, result.sample] = result
