"""Questions in the parquet schema of MATPO-data, and the order in which a run asks them.

Source: MATPO original, the dataset card of `veggiebird/MATPO-data` and `verl/utils/dataset`. Both
families of `extra_info` are read (MuSiQue/GAIA with an integer `index`, FRAMES/WebWalkerQA with a
string one); of the columns only what a rollout or an evaluation needs is kept. Differs: no row is
dropped silently, neither for its length nor as the remainder of an epoch.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from megatron_matpo.data.locate import find_files
from megatron_matpo.data.rows import Problem, core_problems, read_rows
from megatron_matpo.errors import ConfigError, DataError

_COPIES = re.compile(r"_repeat_?\d+\Z")
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
    row: int = 0
    """Within the data set, over all its files, from 0."""
    level: str = ""
    """For breakdowns: GAIA's and FRAMES' `level`, WebWalkerQA's `difficulty_level`."""
    question_type: str = ""
    """For breakdowns: FRAMES' `reasoning_types`, WebWalkerQA's `type`, MuSiQue's hops."""

    @property
    def key(self) -> str:
        """Equal for the copies of one question (`..._repeat_8`), whatever their system prompts."""
        text = f"{self.data_source}\0{self.user}".encode(errors="surrogatepass")
        return hashlib.blake2b(text, digest_size=8).hexdigest()


def shown_source(data_source: str) -> str:
    """A `data_source` as results show it: `gaia_text_103_test_repeat8` without its copies.

    Source: MATPO original, `ray_trainer.py:780`, which renames this one; here every name that ends
    so.
    """
    return _COPIES.sub("", data_source)


def read_questions(source: str | Path, folder: str | Path = "") -> list[Question]:
    """All rows of a data set: a name in `folder`, a parquet file, or a folder of them.

    Raises:
        DataError: no such data set, a missing column, or a row that does not have the expected
            shape; names file, row (from 0, within the file), field, what was found and what was
            expected. `matpo data check` lists all such rows.
    """
    questions: list[Question] = []
    systems: dict[str, str] = {}  # thousands of rows share a prompt of 5,000 characters
    for file in find_files(source, folder):
        for index, row in read_rows(file, _refuse, optional=("level",)):
            for field, text in core_problems(row):
                _refuse(Problem(str(file), index, field, text))
            question = to_question(row, len(questions))
            shared = systems.setdefault(question.system, question.system)
            questions.append(replace(question, system=shared))
    return questions


def to_question(row: dict[str, Any], position: int) -> Question:
    """A row without `core_problems`, as the question at `position` of its data set."""
    extra = cast("dict[str, Any]", row["extra_info"])
    metadata = cast("dict[str, Any]", extra.get("metadata") or {})
    return Question(
        system=row["prompt"][0]["content"],
        user=row["prompt"][1]["content"],
        question=extra["question"],
        ground_truth=row["reward_model"]["ground_truth"],
        data_source=row["data_source"],
        row=position,
        level=_label(row.get("level"), metadata.get("difficulty_level"), metadata.get("level")),
        question_type=_label(
            metadata.get("reasoning_types"), metadata.get("type"), extra.get("question_type")
        ),
    )


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


def prompts_from(num_rows: int, count: int, seed: int, position: int) -> list[int]:
    """Row indices of the next `count` questions after `position` earlier ones; a pure function.

    The rows of epoch 0, 1, ... are one stream that the steps cut: each epoch is a permutation of
    all rows, and no row comes twice within it. A step may hold the end of one epoch and the
    beginning of the next. The position is in every checkpoint, so a resumed run asks what an
    uninterrupted one would have asked.
    """
    if num_rows < 1 or position < 0:
        raise ValueError(f"expected num_rows >= 1 and position >= 0, got {num_rows} and {position}")
    return [
        _epoch_order(num_rows, seed, place // num_rows)[place % num_rows]
        for place in range(position, position + count)
    ]


@lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(num_rows))
    random.Random(f"data-{seed}-{epoch}").shuffle(order)
    return tuple(order)


def _refuse(problem: Problem) -> None:
    raise DataError(str(problem))


def _label(*values: object) -> str:
    """The first value that is there, as text."""
    return next((str(value) for value in values if value is not None and value != ""), "")
