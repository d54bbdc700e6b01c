"""Records of raw files (JSON lines, JSON, TSV, CSV, parquet) and their fields.

Field names are compared without case, spaces and underscores, because the same data set is
published as `Root_Url` and `root_url`, `Final answer` and `final_answer`.
"""

from __future__ import annotations

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (`pyarrow` has no type information.)
import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_matpo.data.rows import file_errors
from megatron_matpo.errors import DataError

_SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".parquet")
_NO_NAME = re.compile(r"[^a-z0-9]")
_BATCH_ROWS = 512


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a raw file."""

    where: str
    """File and line or row, for messages."""
    number: int
    """Position in the file, from 0."""
    fields: dict[str, Any]
    """By simplified name."""

    def get(self, *names: str) -> object:
        """The first field that is there and not null; else None."""
        values = (self.fields.get(simplified(name)) for name in names)
        return next((value for value in values if value is not None), None)

    def text(self, *names: str) -> str:
        """The first such field, which has to be a non-empty text or an integer.

        Raises:
            DataError: names file, record and field.
        """
        value = self.get(*names)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            has = f"; it has {', '.join(self.fields)}" if value is None else ""
            raise self.wrong(names[0], f"expected a non-empty text, got {value!r:.200}{has}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.wrong(names[0], f"expected UTF-8 text, got {value!r:.200}") from error
        return value.strip()

    def wrong(self, name: str, text: str) -> DataError:
        """An error about a field."""
        return DataError(f"{self.where}: {name}: {text}")


def simplified(name: str) -> str:
    """A field's name without case and punctuation."""
    return _NO_NAME.sub("", name.lower())


def find_raw(path: str, names: Sequence[str]) -> Path:
    """The raw file: `path` itself, or the one file of these names in that folder.

    Raises:
        DataError: there is none, or more than one.
    """
    given = Path(path)
    if given.is_file():
        if given.suffix not in _SUFFIXES:
            raise DataError(f"{path}: expected one of {', '.join(_SUFFIXES)}")
        return given
    if not given.is_dir():
        raise DataError(f"{path}: no such file or folder")
    found = sorted({file for name in names for file in given.glob(name)})
    if len(found) != 1:
        what = ", ".join(file.name for file in found) or "none"
        raise DataError(f"{path}: expected one of {', '.join(names)} in this folder, found {what}")
    return found[0]


def read_records(file: Path) -> Iterator[Record]:
    """All records of a file, in order.

    Raises:
        DataError: names file and line or row; also when there are none.
    """
    reader = {
        ".jsonl": _json_lines,
        ".json": _json_list,
        ".tsv": _table,
        ".csv": _table,
        ".parquet": _parquet,
    }[file.suffix]
    number = -1
    try:
        for number, (where, fields) in enumerate(reader(file)):
            if not isinstance(fields, dict):
                raise DataError(f"{where}: expected an object, got {type(fields).__name__}")
            yield Record(where, number, {simplified(name): v for name, v in fields.items()})
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: after record {number}: not UTF-8 ({error})") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    if number < 0:
        raise DataError(f"{file}: has no records")


def sub_record(record: Record, name: str) -> Record:
    """The object in field `name` as a record of its own; no such field: an empty one."""
    value = record.get(name)
    if value is not None and not isinstance(value, dict):
        raise record.wrong(name, f"expected an object, got {value!r:.200}")
    inner = {simplified(key): item for key, item in (value or {}).items()}
    return Record(f"{record.where}: {name}", record.number, inner)


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}: line {number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not valid JSON ({error})") from error


def _json_list(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        items = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(items, list):
        raise DataError(f"{file}: expected a list of objects, got {type(items).__name__}")
    for number, item in enumerate(items):
        yield f"{file}: item {number}", item


def _table(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            names = next(reader, [])
            for number, values in enumerate(reader):
                where = f"{file}: row {number} (line {reader.line_num})"
                if len(values) != len(names):
                    raise DataError(f"{where}: expected {len(names)} cells, got {len(values)}")
                yield where, dict(zip(names, values, strict=True))
        except csv.Error as error:
            raise DataError(f"{file}: line {reader.line_num}: {error}") from error


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield f"{file}: row {number}", row
                    number += 1
    except file_errors() as error:
        raise DataError(f"{file}: cannot be read as parquet ({error})") from error
