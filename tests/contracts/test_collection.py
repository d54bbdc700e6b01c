"""Proves that pytest finds every test file: none is in a folder that it leaves out.

It imports test files by their name alone, and stops at the second of one name.
"""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("test_*.py"))


def test_no_test_lies_in_a_folder_that_pytest_leaves_out(pytestconfig: pytest.Config):
    patterns = pytestconfig.getini("norecursedirs")
    left_out = {
        str(file)
        for file in FILES
        for folder in file.relative_to(TESTS).parts[:-1]
        if any(fnmatch(folder, pattern) for pattern in patterns)
    }
    assert left_out == set()


def test_names_of_test_files_are_unique():
    assert [name for name, count in Counter(f.name for f in FILES).items() if count > 1] == []
