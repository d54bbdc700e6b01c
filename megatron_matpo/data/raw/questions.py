"""Raw questions: what all sources have in common, which are left out, and their rows.

Nothing is lost without being counted: `num_read == len(questions) + dropped.total()`.

Source: MATPO original, `preprocess_json_dataset.py` (columns, suffix, copies). Differs: its copies
are shuffled together; here one pass over all questions follows the other, in a seeded order, so
that the first rows of a set are different questions.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_matpo.data.schema import DataSet

BOXED_SUFFIX = (
    " You should follow the format instruction in the requestion strictly and wrap the final "
    "answer in \\boxed{}."
)
"""Ends every user message. Source: spec of the original, word for word ("requestion" too)."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Which questions are taken; `matpo data build` holds the defaults."""

    seed: int
    """Of the order."""
    limit: int
    """Questions kept, after all else; 0: all."""
    hops: tuple[int, ...]
    """MuSiQue: numbers of hops."""
    max_answer_words: int
    """MuSiQue: longer answers are left out."""
    ids: Collection[str] | None
    """GAIA: the `task_id`s to take; None: all questions without a file."""
    exclude: Collection[str]
    """Normalised questions of sets that this one must not share any with."""


@dataclass(frozen=True, slots=True)
class RawQuestion:
    """One question as its source has it."""

    question: str
    answer: str
    index: int | str
    """Position or id in the source; the type is the config's."""
    question_type: str = ""
    level: int = 0
    """GAIA's."""
    task_id: str = ""
    """GAIA's."""
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """FRAMES' and WebWalkerQA's."""


@dataclass
class Selection:
    """Questions that were kept, and why others were not."""

    options: BuildOptions
    questions: list[RawQuestion] = field(default_factory=list[RawQuestion])
    num_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])
    """Reason -> records."""
    notes: Counter[str] = field(default_factory=Counter[str])
    """What is unusual about records that were kept."""
    found_ids: set[str] = field(default_factory=set[str])
    """GAIA: task ids that the file has, of those asked for."""
    _answers: dict[str, str] = field(default_factory=dict[str, str])

    def drop(self, reason: str) -> None:
        """Leave the current record out."""
        self.dropped[reason] += 1

    def keep(self, item: RawQuestion) -> None:
        """Take the current record, unless its question was there before or is excluded."""
        text = normalized(item.question)
        if text in self.options.exclude:
            self.drop("its question is in a set of --exclude")
        elif text in self._answers:
            same = normalized(item.answer) == self._answers[text]
            self.drop(
                "asks what an earlier one asks"
                if same
                else "asks what an earlier one asks, with another answer"
            )
        else:
            self._answers[text] = normalized(item.answer)
            self.questions.append(item)

    def finish(self) -> None:
        """Put the questions in the seeded order, and cut at the limit."""
        random.Random(f"build-{self.options.seed}").shuffle(self.questions)
        limit = self.options.limit
        if limit and len(self.questions) > limit:
            self.dropped[f"beyond --limit {limit}"] += len(self.questions) - limit
            del self.questions[limit:]
        assert self.num_read == len(self.questions) + self.dropped.total(), "a record got lost"


def normalized(text: str) -> str:
    """Words in lower case without punctuation, for comparisons."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def holds_words(text: str, words: str) -> bool:
    """The words of `words` stand in `text` one after another."""
    wanted = normalized(words)
    return bool(wanted) and f" {wanted} " in f" {normalized(text)} "


def rows_of(
    questions: Sequence[RawQuestion], config: DataSet, system: str, data_source: str
) -> Iterator[dict[str, Any]]:
    """Rows of a data set: `config.repeat` passes over the questions."""
    for _ in range(config.repeat):
        for item in questions:
            yield _row(item, config, system, data_source)


def _row(item: RawQuestion, config: DataSet, system: str, data_source: str) -> dict[str, Any]:
    extra_shape = config.shape["extra_info"]
    assert isinstance(extra_shape, Mapping)
    tools = extra_shape["tools_kwargs"]
    assert isinstance(tools, Mapping)
    extra: dict[str, Any] = {
        "answer": item.answer,
        "index": item.index,
        "need_tools_kwargs": True,
        "question": item.question,
        "split": "train" if config.purpose == "train" else "test",
        "tools_kwargs": {tool: {"create_kwargs": {"ground_truth": item.answer}} for tool in tools},
    }
    if "metadata" in extra_shape:
        extra["metadata"] = dict(item.metadata)
    else:
        extra |= {"evidence_list": None, "question_type": item.question_type}
    row: dict[str, Any] = {
        "dataset": data_source,
        "level": item.level,
        "task_id": item.task_id,
        "data_source": data_source,
        "prompt": [
            {"content": system, "role": "system"},
            {"content": item.question + BOXED_SUFFIX, "role": "user"},
        ],
        "ability": "qa",
        "reward_model": {"ground_truth": item.answer, "style": "rule"},
        "extra_info": extra,
    }
    return {name: row[name] for name in config.shape}
