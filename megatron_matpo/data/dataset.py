"""Questions in the parquet schema of MATPO-data, and the order in which a run asks them.

Source: MATPO original, the dataset card of `veggiebird/MATPO-data` and `verl/utils/dataset`. Both
families of `extra_info` are read (MuSiQue/GAIA with an integer `index`, FRAMES/WebWalkerQA with a
string one); of the columns only those that a rollout needs are loaded. Differs: no row is dropped
silently, neither for its length nor as the remainder of an epoch.
"""

from __future__ import annotations

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (`pyarrow` has no type information.)
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_matpo.errors import ConfigError, DataError

_COLUMNS = ("prompt", "data_source", "reward_model", "extra_info")
_SERVER_MARK = re.compile(r"^## Server name: (\S+)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Question:
    """One row."""

    system: str
    """System message of the row; a recipe may replace it."""
    user: str
    """User message: the question with its instruction to box the answer."""
    question: str
    """The bare question, for graders and records."""
    ground_truth: str
    data_source: str


def read_questions(path: str | Path) -> list[Question]:
    """All rows of a parquet file, or of a folder's parquet files in the order of their names.

    Raises:
        DataError: no such file, a missing column, or a row that does not have the expected shape;
            names file, row (from 0, within the file), field, what was found and what was expected.
    """
    return [question for file in _files(Path(path)) for question in _read_file(file)]


def check_servers(questions: Sequence[Question], allowed: Collection[str], source: str) -> None:
    """Refuse a data set whose system prompts offer servers that the planner may not call.

    MATPO-data has a variant for MATPO and one for single agents; asking one with the other's tools
    would run, and teach nothing.

    Raises:
        ConfigError: names the first such row, its servers and the allowed ones.
    """
    for prompt in dict.fromkeys(question.system for question in questions):
        foreign = sorted(set(_SERVER_MARK.findall(prompt)) - set(allowed))
        if foreign:
            row = next(i for i, question in enumerate(questions) if question.system == prompt)
            raise ConfigError(
                f"{source}: the system prompt of row {row} offers {', '.join(foreign)}, but the "
                f"planner may call {', '.join(sorted(allowed)) or 'nothing'}; take the data set's "
                "variant for this mode, or set system_prompt of the planner"
            )


def prompts_for_step(num_rows: int, prompts_per_step: int, seed: int, step: int) -> list[int]:
    """Row indices that training step `step` (from 1) asks; a pure function, hence resumable.

    The rows of epoch 0, 1, ... are one stream that the steps cut: each epoch is a permutation of
    all rows, and no row comes twice within it. A step may hold the end of one epoch and the
    beginning of the next.
    """
    if num_rows < 1 or step < 1:
        raise ValueError(f"expected num_rows >= 1 and step >= 1, got {num_rows} and {step}")
    first = (step - 1) * prompts_per_step
    return [
        _epoch_order(num_rows, seed, position // num_rows)[position % num_rows]
        for position in range(first, first + prompts_per_step)
    ]


@lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(num_rows))
    random.Random(f"data-{seed}-{epoch}").shuffle(order)
    return tuple(order)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise DataError(f"{path}: the folder has no *.parquet file")
        return files
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    return [path]


def _read_file(file: Path) -> list[Question]:
    import pyarrow as pa  # on first use: 0.1 s that a replay does not need
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(file).names
        missing = [name for name in _COLUMNS if name not in names]
        if missing:
            raise DataError(
                f"{file}: the columns {', '.join(missing)} are missing; it has {', '.join(names)}"
            )
        rows = pq.read_table(file, columns=list(_COLUMNS)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a parquet file that can be read ({error})") from error
    if not rows:
        raise DataError(f"{file}: has no rows")
    return [_question(row, f"{file}: row {index}") for index, row in enumerate(rows)]


def _question(row: dict[str, Any], where: str) -> Question:
    prompt = row["prompt"]
    if not isinstance(prompt, list) or len(prompt) != 2:
        got = f"{len(prompt)} messages" if isinstance(prompt, list) else type(prompt).__name__
        raise DataError(f"{where}: prompt: expected two messages, system and user, got {got}")
    for index, role in enumerate(("system", "user")):
        got = _text(prompt[index], "role", f"{where}: prompt[{index}]")
        if got != role:
            raise DataError(f"{where}: prompt[{index}].role: expected {role!r}, got {got!r}")
    return Question(
        system=_text(prompt[0], "content", f"{where}: prompt[0]"),
        user=_text(prompt[1], "content", f"{where}: prompt[1]"),
        question=_text(row["extra_info"], "question", f"{where}: extra_info"),
        ground_truth=_text(row["reward_model"], "ground_truth", f"{where}: reward_model"),
        data_source=_text(row, "data_source", where),
    )


def _text(record: Any, name: str, where: str) -> str:
    """The non-empty text `record[name]`."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a record with {name!r}, got {type(record).__name__}")
    if name not in record:
        raise DataError(f"{where}: the field {name!r} is missing; it has {', '.join(record)}")
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {name}: expected a non-empty text, got {value!r}"[:1000])
    return value
