"""Rows of parquet files, a batch at a time, and what is wrong with them by file, row and field.

A problem never ends the reading of a file, unless nothing more can be read: who asks decides
whether the first one is an error (`data.dataset`) or all are collected (`data.check`).
"""

from __future__ import annotations

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (`pyarrow` has no type information.)
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_matpo.errors import DataError

BATCH_ROWS = 512
ROLES = ("system", "user")
CORE_COLUMNS = ("prompt", "data_source", "reward_model", "extra_info")
"""What a rollout needs of a row."""
_MAX_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a file or with one of its rows."""

    file: str
    row: int | None
    """From 0, within the file; None: the file as a whole."""
    field: str
    """Dotted, as in `prompt[1].role`; empty: the row or the file as a whole."""
    text: str
    """What was expected, and after a comma what is there."""

    def __str__(self) -> str:
        """`FILE: row 3: prompt[1].role: expected ...`, without what is not known."""
        row = "" if self.row is None else f": row {self.row}"
        field = f": {self.field}" if self.field else ""
        return f"{self.file}{row}{field}: {self.text}"

    @property
    def kind(self) -> str:
        """Equal for problems that differ only in row and value."""
        text = self.text.split(", got ")[0].split(" (")[0].split("; ")[0]
        return f"{self.field}: {text}" if self.field else text


Report = Callable[[Problem], None]
"""Takes a problem; may raise."""


def read_rows(
    file: Path, report: Report, optional: Sequence[str] = (), every_column: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Index and values of each row that can be read.

    Args:
        file: a parquet file.
        report: called with what keeps the file, or one of its rows, from being read.
        optional: columns to read if they are there, beside the core ones.
        every_column: read all columns, and report whatever in them is not valid UTF-8.
    """
    import pyarrow.parquet as pq  # on first use: 0.1 s that a replay does not need

    name, start = str(file), 0
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            missing = [column for column in CORE_COLUMNS if column not in names]
            if missing:
                report(Problem(name, None, "", missing_columns(missing, names)))
                return
            wanted = [column for column in names if column in (*CORE_COLUMNS, *optional)]
            columns = None if every_column else wanted
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for index, row in enumerate(_values(batch, name, start, report), start):
                    if row is not None:
                        yield index, row
                start += batch.num_rows
    except DataError:
        raise  # the reporter's
    except file_errors() as error:
        what = "not a parquet file that can be read"
        where = f"the rows from {start} on cannot be read" if start else what
        report(Problem(name, None, "", f"{where} ({_short(str(error))})"))
        return
    if start == 0:
        report(Problem(name, None, "", "has no rows"))


def file_errors() -> tuple[type[Exception], ...]:
    """What reading a broken parquet file raises; names that are not UTF-8 are a `ValueError`."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)


def missing_columns(missing: Sequence[str], names: Sequence[str]) -> str:
    """Says which columns a file lacks."""
    has = ", ".join(names)
    return f"the columns {', '.join(missing)} are missing; it has {_short(has)}"


def core_problems(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) for everything that a rollout needs of a row."""
    prompt = row["prompt"]
    if not isinstance(prompt, list) or len(prompt) != len(ROLES):
        got = f"{len(prompt)} messages" if isinstance(prompt, list) else type(prompt).__name__
        yield "prompt", f"expected two messages, system and user, got {got}"
    else:
        for index, role in enumerate(ROLES):
            yield from _message_problems(prompt[index], role, f"prompt[{index}]")
    yield from _text_problems(row["extra_info"], "question", "extra_info")
    yield from _text_problems(row["reward_model"], "ground_truth", "reward_model")
    yield from _text_problems(row, "data_source", "")


def _message_problems(message: Any, role: str, where: str) -> Iterator[tuple[str, str]]:
    wrong = list(_text_problems(message, "role", where))
    yield from wrong
    if not wrong and message["role"] != role:
        yield f"{where}.role", f"expected {role!r}, got {message['role']!r}"
    if isinstance(message, dict):
        yield from _text_problems(message, "content", where)


def _text_problems(record: Any, name: str, where: str) -> Iterator[tuple[str, str]]:
    """Nothing if `record[name]` is a non-empty text."""
    if not isinstance(record, dict):
        yield where, f"expected a record with {name!r}, got {type(record).__name__}"
        return
    field = f"{where}.{name}" if where else name
    if name not in record:
        yield field, f"the field is missing; it has {', '.join(record)}"
        return
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        yield field, f"expected a non-empty text, got {_short(repr(value))}"


def _values(batch: Any, file: str, start: int, report: Report) -> Iterator[dict[str, Any] | None]:
    """Rows of a batch; None for one that is not valid UTF-8, which is reported."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = None
    if rows is not None:
        yield from rows
        return
    for index in range(batch.num_rows):
        row: dict[str, Any] | None = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            bad = _not_utf8(column[index], name)
            if bad:
                report(Problem(file, start + index, bad, "expected UTF-8 text, got other bytes"))
                row = None
            elif row is not None:
                row[name] = column[index].as_py()
        yield row


def _not_utf8(scalar: Any, path: str) -> str:
    """Dotted path of the first text inside `scalar` that is not UTF-8; empty: none."""
    import pyarrow as pa

    try:
        scalar.as_py()
    except UnicodeDecodeError:
        if pa.types.is_struct(scalar.type):
            inner = [(f"{path}.{name}", scalar[name]) for name in scalar]
        elif pa.types.is_list(scalar.type) or pa.types.is_large_list(scalar.type):
            inner = [(f"{path}[{i}]", item) for i, item in enumerate(scalar.values)]
        else:
            inner = []
        return next(filter(None, (_not_utf8(item, where) for where, item in inner)), path)
    return ""


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
