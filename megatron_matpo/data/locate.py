"""From what a recipe says (`data.train`, `eval.sets`) to parquet files.

Source: the `configs` section of the dataset card of `veggiebird/MATPO-data`: files of a config are
`NAME/train-*`. Differs: a config may also be one file, `NAME.parquet`, and what a shard's name says
about the number of shards is checked, because a download that broke off is half a data set.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_matpo.data.schema import CONFIGS, SPLIT, DataSet, parse_name
from megatron_matpo.errors import DataError

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?\.parquet")
_MAX_NAMES = 20


def find_files(value: str | Path, folder: str | Path = "") -> list[Path]:
    """Parquet files of a data set, in the order of their names.

    Args:
        value: the name of a data set in `folder` (see `CONFIGS`), else a file, else a folder whose
            parquet files are taken.
        folder: `data.folder`; a plain name is looked up here first, as NAME/train-*.parquet, then
            as NAME.parquet.

    Raises:
        DataError: nothing is there (with the names that are), or a shard is missing.
    """
    text = str(value)
    is_name = Path(text).name == text and not text.endswith(".parquet")
    if not text:
        raise DataError("expected a parquet file, a folder of them, or a name in data.folder")
    if is_name and str(folder):
        found = _in_folder(text, Path(folder))
        if found:
            return found
    path = Path(text)
    if path.is_dir():
        return _shards(path)
    if path.is_file():
        return [path]
    raise DataError(_not_found(text, is_name, str(folder)))


def named_config(value: str | Path) -> DataSet | None:
    """The config that a data set is called after: by its name, its file's or its folder's."""
    path = Path(value)
    candidates = map(parse_name, (path.name, path.stem, path.parent.name))
    return next((config for config in candidates if config is not None), None)


def _in_folder(name: str, folder: Path) -> list[Path]:
    inside, single = folder / name, folder / f"{name}.parquet"
    if inside.is_dir() and single.is_file():
        raise DataError(f"{folder} has both {name}/ and {name}.parquet; remove one of them")
    if inside.is_dir():
        return _shards(inside)
    return [single] if single.is_file() else []


def _shards(folder: Path) -> list[Path]:
    """`train-*.parquet` if there are any, else all parquet files."""
    files = sorted(folder.glob(f"{SPLIT}-*.parquet")) or sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(f"{folder}: the folder has no *.parquet file")
    totals: dict[tuple[str, int], set[int]] = {}
    for file in files:
        match = _SHARD.fullmatch(file.name)
        if match:
            totals.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, total), present in totals.items():
        missing = sorted(set(range(total)) - present)
        if missing:
            raise DataError(
                f"{folder}: {stem}-{missing[0]:05d}-of-{total:05d}.parquet is missing; "
                f"{len(present)} of {total} shards are there"
            )
    if len(totals) > 1:
        names = ", ".join(f"{stem}-*-of-{total:05d}" for stem, total in sorted(totals))
        raise DataError(f"{folder}: shards of several data sets lie together: {names}")
    return files


def _not_found(text: str, is_name: bool, folder: str) -> str:
    if not is_name:
        return f"{text}: no such file or folder"
    known = ", ".join(CONFIGS)
    if not folder:
        hint = "; set data.folder to where it lies" if text in CONFIGS else ""
        return f"{text}: no such file or folder{hint}; configs of MATPO-data: {known}"
    if not Path(folder).is_dir():
        return f"{text}: data.folder={folder} is not a folder; configs of MATPO-data: {known}"
    there = sorted(
        {file.stem for file in Path(folder).glob("*.parquet")}
        | {file.parent.name for file in Path(folder).glob("*/*.parquet")}
    )
    more = f" and {len(there) - _MAX_NAMES} more" if len(there) > _MAX_NAMES else ""
    listed = ", ".join(there[:_MAX_NAMES]) + more
    return (
        f"{text}: neither a data set in data.folder={folder} nor a file; that folder has: "
        f"{listed or 'no parquet file'}; configs of MATPO-data: {known}"
    )
