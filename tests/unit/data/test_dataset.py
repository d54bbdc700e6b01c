"""Proves that both schema families are read, that wrong rows are named, and the order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_matpo.data.dataset import check_servers, prompts_from, read_questions, shown_source
from megatron_matpo.errors import ConfigError, DataError

SYSTEM = "Plan.\n## Server name: browsing_agent\n### Tool name: search_and_browse\n"


def row(index: int | str = 0, **changes: Any) -> dict[str, Any]:
    kwargs = {"create_kwargs": {"ground_truth": "Ada"}}
    extra: dict[str, Any] = {"answer": "Ada", "index": index, "question": "Who?", "split": "train"}
    if isinstance(index, int):  # MuSiQue, GAIA
        extra |= {"evidence_list": None, "tools_kwargs": {"google_search": kwargs}}
    else:  # FRAMES, WebWalkerQA
        extra |= {"metadata": {"level": 1}, "tools_kwargs": {"search_and_browse": kwargs}}
    return {
        "data_source": "musique",
        "prompt": [
            {"content": SYSTEM, "role": "system"},
            {"content": "Who? Box it.", "role": "user"},
        ],
        "ability": "qa",
        "reward_model": {"ground_truth": "Ada", "style": "rule"},
        "extra_info": extra,
    } | changes


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_both_families_and_folders(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", [row("7-x"), row("8-y", data_source="frames")])
    write(tmp_path / "a.parquet", [row(3)])
    questions = read_questions(tmp_path)
    assert [item.data_source for item in questions] == ["musique", "musique", "frames"]
    first = questions[0]
    assert (first.system, first.user) == (SYSTEM, "Who? Box it.")
    assert (first.question, first.ground_truth) == ("Who?", "Ada")


def test_copies_share_a_key_whatever_their_prompts(tmp_path: Path) -> None:
    other = [{"content": "Other.", "role": "system"}, row()["prompt"][1]]
    rows = [row(), row(prompt=other), row(data_source="frames")]
    first, second, third = read_questions(write(tmp_path / "x.parquet", rows))
    assert first.key == second.key != third.key
    assert [item.row for item in (first, second, third)] == [0, 1, 2]


def test_the_number_of_copies_is_not_shown() -> None:
    assert shown_source("gaia_text_103_test_repeat8") == "gaia_text_103_test"
    assert shown_source("matpo_repeat_2_x") == "matpo_repeat_2_x"


SWAPPED = [{"content": "x", "role": "user"}, {"content": "y", "role": "system"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": SWAPPED}, r"row 1: prompt\[0\]\.role: expected 'system', got 'user'"),
        ({"prompt": SWAPPED[:1]}, "row 1: prompt: expected two messages.*got 1 messages"),
        ({"prompt": None}, "row 1: prompt: expected two messages.*NoneType"),
        ({"reward_model": {"ground_truth": None}}, r"row 1: reward_model\.ground_truth: expected"),
        ({"reward_model": None}, "row 1: reward_model: expected a record with 'ground_truth'"),
        ({"data_source": " "}, "row 1: data_source: expected a non-empty text, got ' '"),
        ({"extra_info": {"question": ""}}, r"row 1: extra_info\.question: expected"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.parquet", [row(), row(**changes)])
    with pytest.raises(DataError, match=rf"bad\.parquet: {message}"):
        read_questions(path)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_questions(tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"has no \*\.parquet"):
        read_questions(tmp_path)
    path = tmp_path / "x.parquet"
    path.write_text("question,answer")
    with pytest.raises(DataError, match="not a parquet file"):
        read_questions(path)
    pq.write_table(pa.table({"prompt": ["x"]}), path)
    with pytest.raises(
        DataError, match="columns data_source, reward_model, extra_info are missing"
    ):
        read_questions(path)
    numbers = row() | {"extra_info": {"answer": "Ada"}}
    with pytest.raises(DataError, match=r"row 0: extra_info\.question: the field is missing"):
        read_questions(write(path, [numbers]))


def test_a_data_set_for_the_other_mode_is_refused(tmp_path: Path) -> None:
    questions = read_questions(write(tmp_path / "x.parquet", [row()]))
    check_servers(questions, ["browsing_agent"], "x")
    with pytest.raises(ConfigError, match=r"row 0 offers browsing_agent, but the planner may call"):
        check_servers(questions, ["search_and_scrape_webpage"], "x")


@pytest.mark.parametrize(("rows", "per_step"), [(10, 4), (12, 4), (3, 8), (1, 1)])
def test_every_epoch_is_a_permutation(rows: int, per_step: int) -> None:
    stream = [i for step in range(30) for i in prompts_from(rows, per_step, 5, step * per_step)]
    assert len(stream) == 30 * per_step
    for start in range(0, len(stream) - rows + 1, rows):
        assert Counter(stream[start : start + rows]) == Counter(range(rows))


def test_epochs_meet_without_a_gap_or_a_repetition() -> None:
    """The step that ends one epoch begins the next, and the epochs differ in order."""
    first, second = prompts_from(10, 10, 1, 0), prompts_from(10, 10, 1, 10)
    assert first != second
    assert prompts_from(10, 6, 1, 7) == first[7:] + second[:3]


def test_order_depends_on_seed_and_position_only() -> None:
    one = [prompts_from(100, 8, 1, 8 * step) for step in range(40)]
    assert one[20] == prompts_from(100, 8, 1, 160)  # resuming needs nothing but the position
    # Steps of other sizes cut the same stream, as when a step asked replacements too.
    assert one[0] + one[1] == prompts_from(100, 5, 1, 0) + prompts_from(100, 11, 1, 5)
    assert one != [prompts_from(100, 8, 2, 8 * step) for step in range(40)]
    # Pinned: another order would change runs that are resumed.
    assert one[0] == [57, 26, 14, 67, 93, 48, 97, 99]
    with pytest.raises(ValueError, match="position >= 0"):
        prompts_from(100, 8, 1, -1)
