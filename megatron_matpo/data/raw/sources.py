r"""The four sources: their raw formats, and which of their records become questions.

Raw formats, as their publishers describe them:

* MuSiQue, `musique_ans_v1.0_train.jsonl`: `id` (`2hop__...`), `question`, `answer`,
  `answer_aliases`, `answerable`, `question_decomposition` (one entry per hop), `paragraphs`.
* GAIA, `metadata.jsonl` (or `metadata.parquet`) of the validation split: `task_id`, `Question`,
  `Level` (1 to 3), `Final answer`, `file_name` (empty: no attachment), `Annotator Metadata`.
* FRAMES, `test.tsv`: an index column without a name, `Prompt`, `Answer`, `wikipedia_link_1` to
  `wikipedia_link_11+`, `reasoning_types` (separated by ` | `), `wiki_links` (a Python list).
* WebWalkerQA, a list of objects: `question`, `answer`, `root_url`, `info` with `domain`, `lang`,
  `type` (called `Hop` on its card), `difficulty_level`, `source_website`, `golden_path`.

The rule by which MATPO filtered MuSiQue is not published (its config has 6,175 rows). Ours keeps a
record if all of this holds, in this order:

1. it is answerable (`answerable` is true or absent);
2. question and answer are not empty;
3. it has as many hops as asked for (`--hops`, all by default);
4. the answer has at most `--max-answer-words` words, so that a short reply can be graded;
5. neither the answer nor an alias of it stands in the question;
6. the question, normalised, is in none of the sets of `--exclude`;
7. no earlier record asks the same.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from megatron_matpo.data.raw.questions import (
    BuildOptions,
    RawQuestion,
    Selection,
    holds_words,
    normalized,
)
from megatron_matpo.data.raw.records import Record, find_raw, read_records, sub_record
from megatron_matpo.errors import DataError

_NAMES: Mapping[str, tuple[str, ...]] = {
    "musique": ("musique_ans_v1.0_train.jsonl",),
    "gaia": ("metadata.jsonl", "metadata.parquet"),
    "frames": ("test.tsv",),
    "webwalkerqa": ("*.json", "*.jsonl", "*.parquet"),
}
_LINK = re.compile(r"https?://\S+?(?=,\s*https?://|[,\s]*\Z|\s)")
_HIDDEN_ANSWER = "?"
_GAIA_TEXT = 103
"""Questions of the subset that MATPO evaluates on."""


def select(family: str, path: str, options: BuildOptions) -> Selection:
    """Read a raw file and choose its questions.

    Args:
        family: `musique | gaia | frames | webwalkerqa`.
        path: the raw file, or the folder that it lies in.
        options: which questions to take.

    Raises:
        DataError: a record does not have the form above; names file, line and field. Also when
            no question is left.
    """
    reader: Callable[[Record, Selection], None] = {
        "musique": _musique,
        "gaia": _gaia,
        "frames": _frames,
        "webwalkerqa": _webwalkerqa,
    }[family]
    file = find_raw(path, _NAMES[family])
    selection = Selection(options)
    for record in read_records(file):
        selection.num_read += 1
        reader(record, selection)
    if family == "gaia":
        _check_gaia(selection, file)
    selection.finish()
    if not selection.questions:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in selection.dropped.items())
        raise DataError(f"{file}: no question is left of {selection.num_read} ({reasons})")
    return selection


def data_source(family: str, num_questions: int, repeat: int) -> str:
    """What the rows' `data_source` is called.

    GAIA's is known from the original's code (`gaia_text_103_test_repeat8`); the others' are the
    names that its preprocessing scripts give, and `musique`.
    """
    if family != "gaia":
        return family
    return f"gaia_text_{num_questions}_test" + (f"_repeat{repeat}" if repeat > 1 else "")


def _musique(record: Record, selection: Selection) -> None:
    options = selection.options
    if record.get("answerable") is False:
        return selection.drop("not answerable")
    for name in ("question", "answer"):
        if record.get(name) == "" or str(record.get(name)).isspace():
            return selection.drop(f"its {name} is empty")
    question, answer = record.text("question"), record.text("answer")
    hops = record.get("question_decomposition")
    if not isinstance(hops, list) or not hops:
        raise record.wrong("question_decomposition", f"expected a list, got {hops!r:.200}")
    num_hops = len(cast("list[object]", hops))
    aliases = _texts(record, "answer_aliases")
    if num_hops not in options.hops:
        return selection.drop(f"has {num_hops} hops")
    if len(normalized(answer).split()) > options.max_answer_words:
        return selection.drop(f"its answer has more than {options.max_answer_words} words")
    if any(holds_words(question, text) for text in (answer, *aliases)):
        return selection.drop("its question holds the answer")
    prefix, found, _ = str(record.get("id") or "").partition("__")
    kind = prefix if found else f"{num_hops}hop"
    return selection.keep(RawQuestion(question, answer, record.number, kind))


def _gaia(record: Record, selection: Selection) -> None:
    task_id = record.text("task_id")
    ids = selection.options.ids
    if ids is not None and task_id not in ids:
        return selection.drop("not in --ids")
    selection.found_ids.add(task_id)
    if str(record.get("file_name") or "").strip():
        if ids is not None:
            raise record.wrong("file_name", f"--ids asks for {task_id}, which needs a file")
        return selection.drop("needs a file")
    answer = record.text("Final answer", "answer")
    if answer == _HIDDEN_ANSWER:
        raise record.wrong("Final answer", "is hidden, as in the test split; use validation")
    level = record.text("Level")
    if level not in ("1", "2", "3"):
        raise record.wrong("Level", f"expected 1, 2 or 3, got {level!r}")
    question = record.text("Question")
    item = RawQuestion(question, answer, record.number, "text", int(level), task_id)
    return selection.keep(item)


def _check_gaia(selection: Selection, file: Path) -> None:
    ids = selection.options.ids
    if ids is None:
        num_kept = len(selection.questions)
        if num_kept != _GAIA_TEXT:
            selection.notes[
                f"questions without a file; the published subset has {_GAIA_TEXT}: name its "
                "task ids with --ids"
            ] = num_kept
        return
    missing = sorted(set(ids) - selection.found_ids)
    if missing:
        raise DataError(
            f"{file}: has no task_id {missing[0]} (of --ids); {len(missing)} of {len(ids)} are "
            "missing"
        )


def _frames(record: Record, selection: Selection) -> None:
    number = record.get("", "Unnamed: 0", "id")
    number = record.number if number is None or number == "" else number
    if not str(number).isdecimal():
        raise record.wrong("index column", f"expected an integer, got {number!r:.200}")
    metadata: dict[str, Any] = {
        "level": None,  # FRAMES has none; what MATPO-data has here is not known
        "reasoning_types": record.text("reasoning_types"),
        "row_number": int(str(number)),
        "source": "google/frames-benchmark",
        "wiki_links": _wiki_links(record),
    }
    if not metadata["wiki_links"]:
        selection.notes["questions without a link to Wikipedia"] += 1
    question, answer = record.text("Prompt"), record.text("Answer")
    return selection.keep(RawQuestion(question, answer, str(int(str(number))), metadata=metadata))


def _wiki_links(record: Record) -> list[str]:
    """`wiki_links` if it is a list, also one written as Python; else the links of the columns."""
    value = record.get("wiki_links")
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    if isinstance(value, list):
        return [str(item) for item in cast("list[object]", value) if item]
    names = [*(f"wikipedia_link_{i}" for i in range(1, 11)), "wikipedia_link_11+"]
    cells = [str(record.get(name) or "") for name in names]
    return [link for cell in cells for link in _LINK.findall(cell)]


def _webwalkerqa(record: Record, selection: Selection) -> None:
    info = sub_record(record, "info")
    metadata: dict[str, Any] = {
        "difficulty_level": info.get("difficulty_level"),
        "domain": info.get("domain"),
        "golden_path": _texts(info, "golden_path"),
        "lang": info.get("lang", "language"),
        "source_website": _texts(info, "source_website"),
        "type": info.get("type", "hop"),
    }
    for name, value in metadata.items():
        if value is None:
            selection.notes[f"questions without info.{name}"] += 1
        elif not isinstance(value, str | list):
            raise info.wrong(name, f"expected a text, got {value!r:.200}")
    question, answer = record.text("question"), record.text("answer")
    return selection.keep(RawQuestion(question, answer, str(record.number), metadata=metadata))


def _texts(record: Record, name: str) -> list[str]:
    """A list of texts; one text counts as a list of it, and no field as an empty list."""
    value = record.get(name)
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    items = cast("list[object]", value) if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items):
        raise record.wrong(name, f"expected a list of texts, got {value!r:.200}")
    return [str(item) for item in items]
