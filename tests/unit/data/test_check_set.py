"""Proves that everything that is wrong with a data set is found, by file, row and field."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_matpo.data.check import Findings, check_set
from megatron_matpo.data.dataset import read_questions
from megatron_matpo.data.schema import CONFIGS, DataSet, arrow_schema
from megatron_matpo.data.write import write_set
from megatron_matpo.errors import DataError
from tests.unit.data.test_write import build_rows

Rows = list[dict[str, Any]]
GAIA, MUSIQUE = CONFIGS["matpo_val_gaia_repeat_8"], CONFIGS["matpo_train_musique"]


def check_rows(folder: Path, config: DataSet, change: Callable[[Rows], object]) -> Findings:
    rows = copy.deepcopy(build_rows(config))
    change(rows)
    write_set(folder, config, rows, replace=False)
    return check_set(config.name, str(folder))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r["prompt"].reverse(), "prompt[0].role: expected 'system', got 'user'"),
        (
            lambda r: r["prompt"].append({"content": "x", "role": "user"}),
            "prompt: expected two messages, system and user, got 3 messages",
        ),
        (lambda r: r.update(prompt=None), "prompt: expected two messages, system and user, got N"),
        (
            lambda r: r["prompt"][1].update(content=" "),
            "prompt[1].content: expected a non-empty text, got ' '",
        ),
        (
            lambda r: r["extra_info"].update(question=""),
            "extra_info.question: expected a non-empty text, got ''",
        ),
        (
            lambda r: r["reward_model"].update(ground_truth=None),
            "reward_model.ground_truth: expected a non-empty text, got None",
        ),
        (
            lambda r: r.update(extra_info=None),
            "extra_info: expected a record with 'question', got NoneType",
        ),
        (lambda r: r.update(level=None), "level: expected a value, got null"),
        (lambda r: r.update(task_id=None), "task_id: expected a value, got null"),
        (
            lambda r: r["reward_model"].update(style=None),
            "reward_model.style: expected a value, got null",
        ),
        (
            lambda r: r["extra_info"].update(index=None),
            "extra_info.index: expected a value, got null",
        ),
        (
            lambda r: r["extra_info"]["tools_kwargs"].update(scrape=None),
            "extra_info.tools_kwargs.scrape: expected a value, got null",
        ),
        (
            lambda r: r["reward_model"].update(ground_truth="other"),
            "reward_model.ground_truth: expected the answer of the question's other copy",
        ),
    ],
)
def test_a_wrong_row_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    found = check_rows(tmp_path, GAIA, lambda rows: change(rows[4]))
    first = found.problems[0]
    file = tmp_path / GAIA.name / "train-00000-of-00001.parquet"
    assert str(first).startswith(f"{file}: row 4: {expected}")
    assert (first.file, first.row) == (str(file), 4)


def test_all_problems_are_counted_and_the_first_ones_kept(tmp_path: Path) -> None:
    def change(rows: Rows) -> None:
        for row in rows:
            row["data_source"] = ""
        rows[2]["reward_model"]["style"] = None

    rows = build_rows(GAIA)
    change(rows)
    write_set(tmp_path, GAIA, rows, replace=False)
    found = check_set(GAIA.name, str(tmp_path), max_shown=3)
    assert [problem.row for problem in found.problems] == [0, 1, 2]
    assert found.kinds == {
        "data_source: expected a non-empty text": 24,
        "reward_model.style: expected a value": 1,
    }
    assert found.num_problems == 25


def test_copies_have_to_be_as_many_as_the_name_says(tmp_path: Path) -> None:
    found = check_rows(tmp_path / "a", GAIA, lambda rows: rows.pop())
    (problem,) = found.problems
    assert problem.text == "expected 8 row(s) with this question, got 7"
    assert problem.row == 2  # its first copy
    found = check_rows(tmp_path / "b", MUSIQUE, lambda rows: rows.append(rows[0]))
    assert [str(problem.row) for problem in found.problems] == ["0"]
    assert found.kinds == {"prompt[1].content: expected 1 row(s) with this question": 1}


def test_a_set_without_a_known_name_may_repeat_as_it_likes(tmp_path: Path) -> None:
    file = tmp_path / "mine.parquet"
    rows = build_rows(MUSIQUE)
    pq.write_table(pa.Table.from_pylist([*rows, rows[0]]), file)
    found = check_set(str(file))
    assert found.problems == []
    assert (found.num_rows, found.num_questions, dict(found.copies)) == (4, 3, {1: 2, 2: 1})
    assert found.data_sources == {"musique": 4}
    assert found.question_types.total() == 4


def test_types_are_those_of_the_config(tmp_path: Path) -> None:
    rows = build_rows(MUSIQUE)
    for row in rows:
        row["extra_info"]["index"] = str(row["extra_info"]["index"])
        del row["ability"]
        row["note"] = 1
    folder = tmp_path / MUSIQUE.name
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    found = check_set(MUSIQUE.name, str(tmp_path))
    assert [(problem.field, problem.row) for problem in found.problems] == [
        ("ability", None),
        ("extra_info.index", None),
        ("note", None),
    ]
    assert "expected integer, got text (config matpo_train_musique)" in str(found.problems[1])


def test_an_index_is_a_number_or_a_text_in_any_set(tmp_path: Path) -> None:
    rows = build_rows(MUSIQUE)
    for row in rows:
        row["extra_info"]["index"] = 0.5
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    (problem,) = check_set(str(tmp_path / "x.parquet")).problems
    assert (problem.field, problem.text) == (
        "extra_info.index",
        "expected integer or text, got double",
    )


def test_files_of_both_families_may_lie_together(tmp_path: Path) -> None:
    for index, family in enumerate(("musique", "frames")):
        config = DataSet(family, "matpo")
        table = pa.Table.from_pylist(build_rows(config), schema=arrow_schema(config))
        pq.write_table(table, tmp_path / f"train-{index:05d}-of-00002.parquet")
    found = check_set(str(tmp_path))
    assert found.problems == []
    first = tmp_path / "train-00000-of-00002.parquet"
    note = f"file(s) not like {first}: extra_info.index: expected integer, got text"
    assert found.notes[note] == 1


def bad_text(folder: Path) -> Path:
    """A file whose third row has a text that is not UTF-8, deep inside a column."""
    table = pa.Table.from_pylist(build_rows(MUSIQUE), schema=arrow_schema(MUSIQUE))
    column = table.column("prompt").combine_chunks()
    messages = column.values
    texts = messages.field("content")
    raw = [text.as_buffer().to_pybytes() for text in texts]
    raw[5] = b"caf\xe9"
    content = pa.array(raw, pa.binary()).view(pa.string())
    items = pa.StructArray.from_arrays([content, messages.field("role")], ["content", "role"])
    prompts = pa.ListArray.from_arrays(column.offsets, items, type=column.type)
    place = table.schema.get_field_index("prompt")
    file = folder / "latin.parquet"
    pq.write_table(table.set_column(place, table.schema.field(place), prompts), file)
    return file


def test_what_is_not_utf8_is_named_and_the_other_rows_are_read(tmp_path: Path) -> None:
    file = bad_text(tmp_path)
    found = check_set(str(file))
    (problem,) = found.problems
    assert (problem.row, problem.field) == (2, "prompt[1].content")
    assert found.num_rows == 2
    with pytest.raises(DataError, match=r"row 2: prompt\[1\]\.content: expected UTF-8"):
        read_questions(file)


def test_broken_files_are_survived(tmp_path: Path) -> None:
    file = write_set(tmp_path, GAIA, build_rows(GAIA), replace=False)
    whole = file.read_bytes()
    for broken in (whole[:-9], whole[: len(whole) // 2], b"", b"question,answer"):
        file.write_bytes(broken)
        (problem,) = check_set(GAIA.name, str(tmp_path)).problems
        assert "not a parquet file that can be read" in problem.text
    file.write_bytes(whole[:8] + bytes(len(whole) // 3) + whole[8 + len(whole) // 3 :])
    found = check_set(GAIA.name, str(tmp_path))
    assert found.num_problems > 0
    assert "cannot" in found.problems[0].text or "can be read" in found.problems[0].text


def test_random_damage_never_raises(tmp_path: Path) -> None:
    """300 files with damaged bytes, half of them cut: each is read or refused with a reason."""
    whole = write_set(tmp_path, GAIA, build_rows(GAIA), replace=False).read_bytes()
    file, chance, outcomes = tmp_path / "damaged.parquet", random.Random(3), Counter[bool]()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 3, 20))):
            content[chance.randrange(4, len(whole) - 4)] = chance.randrange(256)
        file.write_bytes(content[: chance.choice((len(whole), chance.randrange(len(whole))))])
        found = check_set(str(file))
        outcomes[bool(found.num_problems)] += 1
        assert found.problems or found.num_rows == len(build_rows(GAIA))
        with suppress(DataError):
            assert len(read_questions(file)) == len(build_rows(GAIA))
    assert outcomes[True] > 150


def test_a_file_without_rows_or_columns_is_named(tmp_path: Path) -> None:
    write_set(tmp_path, MUSIQUE, [], replace=False)
    (problem,) = check_set(MUSIQUE.name, str(tmp_path)).problems
    assert problem.text == "has no rows"
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "x.parquet")
    (problem,) = check_set(str(tmp_path / "x.parquet")).problems
    assert problem.text.startswith("the columns data_source, reward_model, extra_info are missing")
    (problem,) = check_set("nothing", str(tmp_path)).problems
    assert problem.text.startswith("neither a data set in data.folder=")


def test_what_no_reader_looks_at_may_be_null_and_is_noted(tmp_path: Path) -> None:
    def change(rows: Rows) -> None:
        rows[1]["extra_info"]["metadata"]["source"] = None
        rows[2]["extra_info"]["tools_kwargs"]["scrape"]["create_kwargs"]["ground_truth"] = None
        rows[3]["prompt"][1]["content"] = rows[0]["prompt"][1]["content"] = "No box."

    found = check_rows(tmp_path, CONFIGS["matpo_val_frames_repeat_2"], change)
    assert found.problems == []
    assert found.notes == {
        "extra_info.metadata.level is null": 6,
        "extra_info.metadata.source is null": 1,
        "extra_info.tools_kwargs.scrape.create_kwargs.ground_truth is null": 1,
        "prompt[1].content does not ask for an answer in \\boxed{}": 2,
        "rows; MATPO-data's matpo_val_frames_repeat_2 has 1648": 6,
    }
