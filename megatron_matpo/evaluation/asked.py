"""Which episodes of a set are still to be asked, in which chunks, and when to give up.

Invariant: an episode whose result is in the set's file is never asked again, unless its row has
changed or it failed for reasons outside the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_matpo.config.root import Config
from megatron_matpo.data.dataset import read_questions
from megatron_matpo.errors import RolloutError
from megatron_matpo.evaluation.inputs import results_path, row_hash
from megatron_matpo.evaluation.results import EpisodeResult, ResultsFile
from megatron_matpo.types import RowAsk

_CHUNK_FILE = re.compile(r"chunk_(\d+)\.(?:jsonl|rollout)")
_MAX_REASONS = 3
_MAX_REASON_CHARS = 300


@dataclass(frozen=True)
class EvalSet:
    """One set, what is wanted of it, and what is there."""

    name: str
    hashes: list[str]
    """Of all rows (see `row_hash`)."""
    num_rows: int
    """That are asked, from the first."""
    num_samples: int
    """Of each row."""
    file: ResultsFile

    def wanted_results(self) -> list[EpisodeResult]:
        """Results of wanted episodes, failed ones included; those of changed rows left out."""
        return [
            item
            for item in self.file.results
            if item.row < self.num_rows
            and item.sample < self.num_samples
            and item.row_hash == self.hashes[item.row]
        ]

    def missing(self) -> dict[int, list[int]]:
        """Row -> samples without a verdict; rows with all of theirs are left out."""
        there = {(x.row, x.sample) for x in self.wanted_results() if x.accuracy is not None}
        every = {
            row: [i for i in range(self.num_samples) if (row, i) not in there]
            for row in range(self.num_rows)
        }
        return {row: samples for row, samples in every.items() if samples}

    def chunks(self, num_rows: int) -> Iterator[Chunk]:
        """What is missing, `num_rows` rows at a time; numbers follow those of earlier starts."""
        missing = self.missing()
        rows = list(missing)
        first = 1 + max(self._recorded(), default=0)
        for place, start in enumerate(range(0, len(rows), num_rows)):
            part = {row: missing[row] for row in rows[start : start + num_rows]}
            yield Chunk(self, first + place, part)

    def chunk_path(self, number: int) -> Path:
        """Recording of a chunk, without its suffix."""
        return self.file.path.parent / f"chunk_{number:06d}"

    def progress(self) -> dict[str, float]:
        """Counts of episodes, and the sum of accuracies, for the supervisor's line."""
        results = self.wanted_results()
        scored = [item.accuracy for item in results if item.accuracy is not None]
        return {
            "wanted": self.num_rows * self.num_samples,
            "scored": len(scored),
            "failed": len(results) - len(scored),
            "accuracy_sum": sum(scored),
        }

    def _recorded(self) -> Iterator[int]:
        """Numbers of chunks that earlier starts recorded, whether their results were kept or not.

        A number is never used twice: it is part of the episodes' ids.
        """
        folder = self.file.path.parent
        for file in folder.iterdir() if folder.is_dir() else ():
            if match := _CHUNK_FILE.fullmatch(file.name):
                yield int(match[1])


@dataclass(frozen=True)
class Chunk:
    """Some missing episodes of a set: one request to the manager."""

    set: EvalSet
    number: int
    """From 1, unique within the set."""
    samples: Mapping[int, list[int]]
    """Row -> numbers of its samples."""

    @property
    def asks(self) -> list[RowAsk]:
        """As the manager is asked."""
        return [RowAsk(row, len(samples)) for row, samples in self.samples.items()]


def open_sets(config: Config, run_dir: Path) -> list[EvalSet]:
    """All sets of `eval.sets`, with their results so far.

    Raises:
        DataError: a set or a results file cannot be read.
    """
    sets: list[EvalSet] = []
    for name, entry in config.eval.named_sets.items():
        questions = read_questions(entry, config.data.folder)
        sets.append(
            EvalSet(
                name=name,
                hashes=[row_hash(question) for question in questions],
                num_rows=min(config.eval.max_rows or len(questions), len(questions)),
                num_samples=config.eval.samples_per_row,
                file=ResultsFile(results_path(run_dir, name)),
            )
        )
    return sets


@dataclass
class FailureBound:
    """`rollout.max_failed_frac` over the episodes that this start has asked so far.

    They count as at least one full chunk, or the whole evaluation if it is smaller: one failure
    among the last three must not end anything.
    """

    config: Config
    num_wanted: int
    """Episodes of the whole evaluation."""
    num_asked: int = 0
    num_failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter[str])

    def add(self, results: Iterable[EpisodeResult]) -> None:
        """Count a finished chunk.

        Raises:
            RolloutError: too many failed; names the reasons.
        """
        for item in results:
            self.num_asked += 1
            if item.accuracy is None:
                self.num_failed += 1
                self.reasons[item.failure[:_MAX_REASON_CHARS]] += 1
        section, limit = self.config.eval, self.config.rollout.max_failed_frac
        least = min(section.chunk_rows * section.samples_per_row, self.num_wanted)
        if self.num_failed <= limit * max(self.num_asked, least):
            return
        most = self.reasons.most_common(_MAX_REASONS)
        raise RolloutError(
            f"{self.num_failed} of {self.num_asked} episodes failed outside the model, more than "
            f"rollout.max_failed_frac={limit:g} allows; what came is kept, and the same command "
            f"asks the rest: {'; '.join(f'{count} x {reason}' for reason, count in most)}"
        )
