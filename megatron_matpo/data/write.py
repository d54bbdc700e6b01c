"""Data sets written and rewritten: whole or not at all, a row group at a time.

A file or folder gets its name only when all of it is on disk. Source: MATPO original,
`update_system_prompt.py` (rewriting). Differs: there, one file is converted whole through Python
dicts, the ground truths in `tools_kwargs` become null, and types are guessed anew; here everything
but the system messages stays as it is, types, row groups and metadata included.
"""

from __future__ import annotations

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (`pyarrow` has no type information.)
import os
import shutil
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_matpo.data.rows import CORE_COLUMNS, ROLES, file_errors, missing_columns
from megatron_matpo.data.schema import SPLIT, DataSet, arrow_schema
from megatron_matpo.errors import DataError

ROWS_PER_GROUP = 1000
SHARD_NAME = f"{SPLIT}-00000-of-00001.parquet"


@dataclass
class Rewrite:
    """What a rewriting of system messages did."""

    num_rows: int = 0
    num_changed: int = 0
    """Rows whose system message is another one now."""
    old_prompts: Counter[str] = field(default_factory=Counter[str])
    """System messages before, with their number of rows."""
    files: list[Path] = field(default_factory=list[Path])
    """Written ones."""


def write_set(folder: Path, config: DataSet, rows: Iterable[dict[str, Any]], replace: bool) -> Path:
    """Write FOLDER/NAME/train-00000-of-00001.parquet with exactly the config's schema.

    Args:
        folder: what `data.folder` will be.
        config: names the data set and its columns.
        rows: in order; values have to fit the schema.
        replace: a file of this name may be replaced.

    Raises:
        DataError: there is such a data set already, or the folder cannot be written.
    """
    target = folder / config.name / SHARD_NAME
    others = sorted(file.name for file in target.parent.glob("*.parquet") if file != target)
    if others or (target.exists() and not replace):
        what = f"holds {', '.join(others[:3])}" if others else "exists; --replace overwrites it"
        raise DataError(f"{target.parent if others else target}: {what}")
    single = folder / f"{config.name}.parquet"
    if single.exists():
        raise DataError(f"{single}: exists, and {config.name}/ beside it would be ambiguous")
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(config)
    with _becoming(target) as temporary:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(temporary, schema) as writer:
            for group in _groups(rows):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
        _sync(temporary)
    return target


def rewrite_prompts(sources: Sequence[Path], target: Path, new_prompt: str) -> Rewrite:
    """Copy a data set with another system message in every row; all else stays as it is.

    Args:
        sources: its files.
        target: a parquet file if there is one source, else a folder that gets files of the same
            names. It must not exist.
        new_prompt: the system message.

    Raises:
        DataError: the target exists or is a source, a source cannot be read, or a row does not
            begin with a system message; nothing is left behind.
    """
    is_file = target.suffix == ".parquet"
    if is_file and len(sources) > 1:
        raise DataError(f"{target}: {len(sources)} files are rewritten into a folder, not a file")
    for source in sources:
        if target.resolve() in (source.resolve(), source.resolve().parent):
            raise DataError(f"{target}: is the source; name another file or folder")
    if target.exists():
        raise DataError(f"{target}: exists; name a new file or folder")
    done = Rewrite()
    with _becoming(target) as temporary:
        (temporary.parent if is_file else temporary).mkdir(parents=True, exist_ok=True)
        for source in sources:
            out = temporary if is_file else temporary / source.name
            _rewrite_file(source, out, new_prompt, done)
            _sync(out)
            done.files.append(target if is_file else target / source.name)
    return done


def _rewrite_file(source: Path, target: Path, new_prompt: str, done: Rewrite) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source) as parquet:
            schema = parquet.schema_arrow
            missing = [name for name in CORE_COLUMNS if name not in schema.names]
            if missing:
                raise DataError(f"{source}: {missing_columns(missing, schema.names)}")
            column = schema.get_field_index("prompt")
            start = 0
            with pq.ParquetWriter(target, schema, compression=_compression(parquet)) as writer:
                for group in range(parquet.num_row_groups):
                    table = parquet.read_row_group(group)
                    prompts = _prompts(table.column(column), source, start)
                    start += len(prompts)
                    for prompt in prompts:
                        old = prompt[0]["content"]
                        done.old_prompts[old] += 1
                        done.num_changed += old != new_prompt
                        prompt[0]["content"] = new_prompt
                    item = schema.field(column)
                    changed = table.set_column(column, item, pa.array(prompts, type=item.type))
                    writer.write_table(changed, row_group_size=max(1, table.num_rows))
            done.num_rows += start
    except DataError:
        raise
    except file_errors() as error:
        raise DataError(f"{source}: cannot be rewritten ({str(error)[:300]})") from error


def _prompts(column: Any, source: Path, start: int) -> list[list[dict[str, str]]]:
    """Messages of each row, the first of which can be replaced."""
    try:
        prompts = column.to_pylist()
    except UnicodeDecodeError as error:
        rows = f"rows {start} to {start + len(column) - 1}"
        raise DataError(f"{source}: {rows}: prompt: not UTF-8 ({error})") from error
    for index, prompt in enumerate(prompts, start):
        messages = prompt if isinstance(prompt, list) else []
        roles = [
            item["role"] if isinstance(item, dict) and {"role", "content"} <= item.keys() else None
            for item in messages
        ]
        if roles != list(ROLES):
            raise DataError(f"{source}: row {index}: prompt: expected {list(ROLES)}, got {roles}")
    return prompts


def _compression(parquet: Any) -> str:
    """Of the file's first column, as the writer spells it."""
    if parquet.num_row_groups == 0:
        return "snappy"
    name = parquet.metadata.row_group(0).column(0).compression.lower()
    return "none" if name == "uncompressed" else name


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    items = iter(rows)
    while group := list(islice(items, ROWS_PER_GROUP)):
        yield group


@contextmanager
def _becoming(target: Path) -> Generator[Path]:
    """A name beside `target` that becomes it at the end; on an error nothing is left behind.

    Raises:
        DataError: the place cannot be written to.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error})") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary.exists():
            temporary.unlink()


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
