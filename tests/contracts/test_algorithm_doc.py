"""Proves that docs/algorithm.md names files and tests that exist, and leaves no item out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if re.match(r"\| (\d+\.\d+|C\d+) \|", line)]
ITEMS = [
    *(f"1.{n}" for n in range(1, 11)),
    *(f"2.{n}" for n in range(1, 5)),
    *(f"3.{n}" for n in range(1, 4)),
    *(f"4.{n}" for n in range(1, 4)),
    *(f"9.{n}" for n in range(1, 9)),
    *(f"C{n}" for n in range(1, 17)),
]


@pytest.mark.parametrize("item", ITEMS)
def test_every_item_has_a_row(item: str) -> None:
    assert any(row.startswith(f"| {item} |") for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:40])
def test_files_and_tests_exist(row: str) -> None:
    *_, code, tests, _ = row.split("|")
    for name in re.findall(r"`([^`]+)`", code):
        assert (ROOT / "megatron_matpo" / name).is_file(), name
    named = re.findall(r"`([^`]+)`", tests)
    assert named
    for name in named:
        path, _, function = name.partition("::")
        in_unit = ROOT / "tests" / "unit" / path
        file = in_unit if in_unit.is_file() else ROOT / "tests" / path
        assert file.is_file(), name
        assert not function or f"def {function}(" in file.read_text(encoding="utf-8"), name
