"""Proves what becomes of each record of small raw files in their publishers' formats.

The files in `files/` are written by hand after the publishers' descriptions; the real ones were not
available, so that a format that changed since would show only when they are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_matpo.data.raw.questions import (
    BOXED_SUFFIX,
    BuildOptions,
    holds_words,
    normalized,
    rows_of,
)
from megatron_matpo.data.raw.sources import data_source, select
from megatron_matpo.data.schema import REPEATS, DataSet
from megatron_matpo.errors import DataError

FILES = Path(__file__).parent / "files"
RAW = {
    "musique": FILES / "musique_ans_v1.0_train.jsonl",
    "gaia": FILES / "metadata.jsonl",
    "frames": FILES / "test.tsv",
    "webwalkerqa": FILES / "webwalkerqa.json",
}
OPTIONS = BuildOptions(
    seed=0, limit=0, hops=(2, 3, 4), max_answer_words=10, ids=None, exclude=frozenset()
)
Change = Callable[[dict[str, Any]], None]


def changed(source: Path, target: Path, change: Change) -> Path:
    """A copy of a file of JSON lines whose second record is changed."""
    records = [json.loads(line) for line in source.read_text().splitlines()]
    change(records[1])
    target.write_text("".join(json.dumps(record) + "\n" for record in records))
    return target


@pytest.mark.parametrize("family", sorted(RAW))
def test_no_record_is_lost_and_the_order_is_a_function_of_the_seed(family: str) -> None:
    one = select(family, str(RAW[family]), OPTIONS)
    assert one.num_read == len(one.questions) + one.dropped.total()
    assert select(family, str(RAW[family]), OPTIONS) == one
    orders = {
        tuple(item.index for item in select(family, str(RAW[family]), options).questions)
        for options in (replace(OPTIONS, seed=seed) for seed in range(8))
    }
    assert len(orders) > 1
    assert len({frozenset(order) for order in orders}) == 1


def test_musique_is_filtered_by_the_rule() -> None:
    found = select("musique", str(RAW["musique"]), OPTIONS)
    assert {(item.index, item.question_type, item.answer) for item in found.questions} == {
        (0, "2hop", "Oslo"),
        (1, "3hop1", "Norwegian krone"),
        (9, "4hop1", "Zoë O\u2019Neil"),
    }
    assert found.dropped == {
        "asks what an earlier one asks": 1,
        "asks what an earlier one asks, with another answer": 1,
        "its question holds the answer": 2,  # one of them holds an alias
        "its answer has more than 10 words": 1,
        "not answerable": 1,
        "its answer is empty": 1,
    }


def test_options_narrow_the_choice() -> None:
    options = replace(OPTIONS, hops=(2, 4), max_answer_words=1)
    found = select("musique", str(RAW["musique"]), options)
    assert [item.index for item in found.questions] == [0]
    assert found.dropped["has 3 hops"] == 1
    excluded = frozenset({normalized("WHERE was the founder of Linden born")})
    found = select("musique", str(RAW["musique"]), replace(OPTIONS, exclude=excluded))
    assert {item.index for item in found.questions} == {1, 9}
    assert found.dropped["its question is in a set of --exclude"] == 3
    found = select("musique", str(RAW["musique"]), replace(OPTIONS, limit=1))
    assert len(found.questions) == 1
    assert found.dropped["beyond --limit 1"] == 2


def test_gaia_takes_questions_without_a_file() -> None:
    found = select("gaia", str(FILES), OPTIONS)
    by_id = {item.task_id[-1]: item for item in found.questions}
    assert sorted(by_id) == ["1", "3", "4"]
    assert (by_id["3"].level, by_id["3"].answer) == (2, "Bell, Ann")
    assert by_id["4"].question == "Which year?\nGive four digits."
    assert found.dropped == {"needs a file": 1}
    assert found.notes.total() == 3  # not the published subset


def test_gaia_takes_exactly_the_ids_that_are_asked_for() -> None:
    ids = [f"00000000-0000-0000-0000-00000000000{i}" for i in range(1, 6)]
    found = select("gaia", str(FILES), replace(OPTIONS, ids={ids[0], ids[3]}))
    assert {item.task_id for item in found.questions} == {ids[0], ids[3]}
    assert found.notes == {}
    with pytest.raises(DataError, match=r"line 2: file_name: --ids asks for 0+-.*needs a file"):
        select("gaia", str(FILES), replace(OPTIONS, ids={ids[0], ids[1]}))
    with pytest.raises(DataError, match=r"no task_id .*5 \(of --ids\); 1 of 2 are missing"):
        select("gaia", str(FILES), replace(OPTIONS, ids={ids[0], ids[4]}))


def test_frames_keeps_links_types_and_numbers() -> None:
    found = select("frames", str(FILES), OPTIONS)
    by_index = {item.index: item for item in found.questions}
    wiki = "https://en.wikipedia.org/wiki/"
    assert by_index["0"].question == 'How much older is "Linden" than Elm?'
    assert by_index["0"].metadata == {
        "level": None,
        "reasoning_types": "Numerical reasoning | Multiple constraints",
        "row_number": 0,
        "source": "google/frames-benchmark",
        "wiki_links": [f"{wiki}Linden", f"{wiki}Elm_(town)"],
    }
    assert by_index["1"].question == "Two lines:\nwho came first?"
    links = [f"{wiki}Ann_Bell", f"{wiki}A,_B", f"{wiki}C"]
    assert by_index["1"].metadata["wiki_links"] == links
    assert by_index["2"].answer == "The\ttower"
    assert found.notes == {"questions without a link to Wikipedia": 1}


def test_webwalkerqa_is_read_as_it_is_published_and_as_its_card_says(tmp_path: Path) -> None:
    found = select("webwalkerqa", str(RAW["webwalkerqa"]), OPTIONS)
    second = next(item for item in found.questions if item.index == "1")
    assert second.question == "会议在哪里举行\uff1f"
    assert second.metadata == {
        "difficulty_level": "hard",
        "domain": "conference",
        "golden_path": ["root->call"],
        "lang": "zh",
        "source_website": ["https://conf.example/call"],
        "type": "multi_source",
    }
    info = {"Hop": "multi-source", "Language": "English", "Difficulty_Level": "Medium"}
    record = {"Question": "Q?", "Answer": "A", "Root_Url": "u", "Info": info}
    file = tmp_path / "card.jsonl"
    file.write_text(json.dumps(record) + "\n")
    found = select("webwalkerqa", str(tmp_path), OPTIONS)
    metadata = found.questions[0].metadata
    assert (metadata["type"], metadata["lang"]) == ("multi-source", "English")
    assert found.notes == {"questions without info.domain": 1}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("musique", lambda r: r.pop("question"), "line 2: question: expected a non-empty text"),
        ("musique", lambda r: r.update(answer=["x"]), r"line 2: answer: .*got \['x'\]"),
        ("musique", lambda r: r.update(answer="\ud800"), "line 2: answer: expected UTF-8"),
        (
            "musique",
            lambda r: r.update(question_decomposition=[]),
            r"line 2: question_decomposition: expected a list, got \[\]",
        ),
        (
            "musique",
            lambda r: r.update(answer_aliases=[3]),
            r"line 2: answer_aliases: expected a list of texts, got \[3\]",
        ),
        ("gaia", lambda r: r.pop("task_id"), "line 2: task_id: .*it has question, level"),
        (
            "gaia",
            lambda r: r.update(file_name="", Level=4),
            "line 2: Level: expected 1, 2 or 3, got '4'",
        ),
        (
            "gaia",
            lambda r: r.update({"file_name": "", "Final answer": "?"}),
            "line 2: Final answer: is hidden, as in the test split",
        ),
    ],
)
def test_wrong_records_are_named(tmp_path: Path, family: str, change: Change, message: str) -> None:
    file = changed(RAW[family], tmp_path / RAW[family].name, change)
    with pytest.raises(DataError, match=message):
        select(family, str(file), OPTIONS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"task_id": "a"\n', "line 1: not valid JSON"),
        ("metadata.jsonl", b"[1]\n", "line 1: expected an object, got list"),
        ("metadata.jsonl", b'{"task_id": "\xff"}\n', "after record -1: not UTF-8"),
        ("metadata.jsonl", b"\n\n", "has no records"),
        ("metadata.parquet", b"PAR1", "cannot be read as parquet"),
        ("x.json", b'{"task_id": "a"}', "expected a list of objects, got dict"),
        ("x.tsv", b"a\tb\n1\n", r"row 0 \(line 2\): expected 2 cells, got 1"),
        ("x.tsv", b'a\tb\n1\t"2\n', "line 2: unexpected end of data"),
        ("x.zip", b"PK", r"expected one of \.jsonl, \.json"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        select("gaia", str(tmp_path / name), OPTIONS)


def test_a_folder_has_to_hold_one_raw_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected one of metadata\.jsonl, metadata.*none"):
        select("gaia", str(tmp_path), OPTIONS)
    (tmp_path / "a.json").touch()
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(DataError, match=r"found a\.json, b\.jsonl"):
        select("webwalkerqa", str(tmp_path), OPTIONS)
    with pytest.raises(DataError, match="no such file or folder"):
        select("gaia", str(tmp_path / "none"), OPTIONS)


def test_a_selection_without_questions_says_why() -> None:
    with pytest.raises(DataError, match=r"no question is left of 10 \(.*has 2 hops: 6"):
        select("musique", str(RAW["musique"]), replace(OPTIONS, hops=(7,)))


def test_copies_come_in_passes_with_equal_rows() -> None:
    found = select("gaia", str(FILES), OPTIONS)
    config = DataSet("gaia", "matpo", REPEATS["gaia"])
    rows = list(rows_of(found.questions, config, "S", "gaia_text_3_test_repeat8"))
    assert len(rows) == 24
    assert rows[:3] == rows[3:6] == rows[21:]
    assert [row["task_id"] for row in rows[:3]] == [item.task_id for item in found.questions]
    assert rows[0]["prompt"][1]["content"] == (
        f"{found.questions[0].question} You should follow the format instruction in the requestion "
        "strictly and wrap the final answer in \\boxed{}."
    )
    assert BOXED_SUFFIX[0] == " "


def test_names_of_the_sources() -> None:
    assert data_source("gaia", 103, 8) == "gaia_text_103_test_repeat8"
    assert data_source("frames", 824, 2) == "frames"


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert normalized("  The “Café”, \uff21\n1! ") == "the café a 1"
    assert holds_words("Is New York big?", "new YORK")
    assert not holds_words("Is Newark big?", "new")
    assert not holds_words("anything", "?!")
