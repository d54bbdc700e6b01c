"""Every row of a data set checked: types, nulls, messages, copies of questions.

All problems are counted, and the first ones kept with file, row and field. What no reader of this
package needs (`metadata`, `question_type`, stored ground truths of tools) may be null; it is
counted as a note. A data set that is called after a config of MATPO-data has to have its types and
its number of copies too.
"""

from __future__ import annotations

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (`pyarrow` has no type information.)
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_matpo.data.dataset import Question, shown_source, to_question
from megatron_matpo.data.locate import find_files, named_config
from megatron_matpo.data.rows import Problem, core_problems, file_errors, read_rows
from megatron_matpo.data.schema import DataSet, Shape, differences, shape_of
from megatron_matpo.errors import DataError

MAX_SHOWN = 50
RowCheck = Callable[[Question], Iterator[tuple[str, str]]]
"""A further check of a row: (field, what is wrong)."""

_INDEX_TYPES = ("int64", "string", "null")
_MAY_BE_NULL = re.compile(r"extra_info\.(metadata|question_type|tools_kwargs\..+\.ground_truth)\b")
# Nulls that `core_problems` reports.
_CORE = re.compile(
    r"prompt\b|data_source|reward_model(\.ground_truth)?\Z|extra_info(\.question)?\Z"
)
_ALWAYS_NULL = "extra_info.evidence_list"
_BOX = "\\boxed{}"


@dataclass(slots=True)
class _Seen:
    """First copy of a question."""

    file: str
    row: int
    truth: str
    copies: int = 1


@dataclass
class Findings:
    """What was found in one data set."""

    name: str
    config: DataSet | None
    """What it is called after."""
    max_shown: int = MAX_SHOWN
    num_rows: int = 0
    """Rows that could be read."""
    problems: list[Problem] = field(default_factory=list[Problem])
    """The first `max_shown` ones."""
    kinds: Counter[str] = field(default_factory=Counter[str])
    """All problems, counted by what is wrong."""
    notes: Counter[str] = field(default_factory=Counter[str])
    """Rows by what is unusual but allowed."""
    copies: Counter[int] = field(default_factory=Counter[int])
    """Number of copies -> questions that have so many."""
    data_sources: Counter[str] = field(default_factory=Counter[str])
    levels: Counter[str] = field(default_factory=Counter[str])
    question_types: Counter[str] = field(default_factory=Counter[str])

    @property
    def num_problems(self) -> int:
        """All of them, shown or not."""
        return self.kinds.total()

    @property
    def num_questions(self) -> int:
        """Different ones."""
        return self.copies.total()

    def add(self, problem: Problem) -> None:
        """Count a problem, and keep it if it is among the first."""
        self.kinds[problem.kind] += 1
        if len(self.problems) < self.max_shown:
            self.problems.append(problem)


def check_set(
    source: str, folder: str = "", *, more: RowCheck | None = None, max_shown: int = MAX_SHOWN
) -> Findings:
    """Read all rows of a data set; never raises for what is wrong with it.

    Args:
        source: name in `folder`, file, or folder, as `data.train`.
        folder: `data.folder`.
        more: called for every row whose core is sound.
        max_shown: problems to keep in full.
    """
    findings = Findings(source, named_config(source), max_shown)
    try:
        files = find_files(source, folder)
    except DataError as error:
        findings.add(Problem(source, None, "", str(error).removeprefix(f"{source}: ")))
        return findings
    seen: dict[str, _Seen] = {}
    shapes: dict[str, Shape] = {}
    for file in files:
        _check_columns(file, shapes, findings)
        for index, row in read_rows(file, findings.add, every_column=True):
            findings.num_rows += 1
            for name, text in _row_problems(row, findings):
                findings.add(Problem(str(file), index, name, text))
            if not any(core_problems(row)):
                question = to_question(row, findings.num_rows - 1)
                _count(question, str(file), index, seen, findings)
                for name, text in more(question) if more is not None else ():
                    findings.add(Problem(str(file), index, name, text))
    _check_copies(seen, findings)
    return findings


def _check_columns(file: Path, shapes: dict[str, Shape], findings: Findings) -> None:
    """Types of the config that the set is called after; else those that all readers rely on.

    Other sets may mix both families, which the readers tell apart row by row.
    """
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except file_errors():
        return  # said when the rows are read
    shape = {item.name: shape_of(item.type) for item in schema}
    first, expected = next(iter(shapes.items()), (str(file), shape))
    shapes[str(file)] = shape
    if findings.config is None:
        for name, text in _index_problem(shape):
            findings.add(Problem(str(file), None, name, text))
        for name, text in differences(expected, shape):
            findings.notes[f"file(s) not like {first}: {name}: {text}"] += 1
        return
    for name, text in differences(findings.config.shape, shape):
        text = f"{text} (config {findings.config.name})"
        findings.add(Problem(str(file), None, name, text))


def _index_problem(shape: dict[str, Shape]) -> Iterator[tuple[str, str]]:
    extra = shape.get("extra_info")
    index = extra.get("index", "null") if isinstance(extra, dict) else "null"
    if index not in _INDEX_TYPES:
        yield "extra_info.index", f"expected integer or text, got {index}"


def _row_problems(row: dict[str, Any], findings: Findings) -> Iterator[tuple[str, str]]:
    yield from core_problems(row)
    for name, value in row.items():
        for path in _nulls(value, name):
            if _CORE.match(path) or path.startswith(_ALWAYS_NULL):
                continue
            if findings.config is None or _MAY_BE_NULL.match(path):
                findings.notes[f"{path} is null"] += 1
            else:
                yield path, "expected a value, got null"


def _nulls(value: Any, path: str) -> Iterator[str]:
    """Dotted paths of the nulls in a value."""
    if value is None:
        yield path
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _nulls(item, f"{path}.{name}")
    elif isinstance(value, list):
        for item in value:
            yield from _nulls(item, f"{path}[]")


def _count(
    question: Question, file: str, index: int, seen: dict[str, _Seen], findings: Findings
) -> None:
    findings.data_sources[shown_source(question.data_source)] += 1
    findings.levels[question.level or "-"] += 1
    findings.question_types[question.question_type or "-"] += 1
    if _BOX not in question.user:
        findings.notes[f"prompt[1].content does not ask for an answer in {_BOX}"] += 1
    first = seen.get(question.key)
    if first is None:
        seen[question.key] = _Seen(file, index, question.ground_truth)
        return
    first.copies += 1
    if first.truth != question.ground_truth:
        text = (
            f"expected the answer of the question's other copy ({first.file}: row {first.row}: "
            f"{first.truth[:80]!r}), got {question.ground_truth[:80]!r}"
        )
        findings.add(Problem(file, index, "reward_model.ground_truth", text))


def _check_copies(seen: dict[str, _Seen], findings: Findings) -> None:
    config = findings.config
    for item in seen.values():
        findings.copies[item.copies] += 1
        if config is not None and item.copies != config.repeat:
            copies = f"expected {config.repeat} row(s) with this question, got {item.copies}"
            findings.add(Problem(item.file, item.row, "prompt[1].content", copies))
    if config is not None and config.num_rows not in (0, findings.num_rows):
        findings.notes[f"rows; MATPO-data's {config.name} has {config.num_rows}"] = (
            findings.num_rows
        )
