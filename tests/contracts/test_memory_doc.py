"""Proves that the plans in docs/memory.md are what the command prints.

After a change of a formula: `python tests/contracts/test_memory_doc.py` writes them anew.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import pytest

from megatron_matpo.__main__ import main

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "memory.md"
BLOCK = re.compile(r"```\n\$ matpo (plan [^\n]*)\n(.*?)```\n", re.DOTALL)


def printed(arguments: str) -> str:
    output = io.StringIO()
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(output):
            assert main(arguments.split()) == 0
    finally:
        os.chdir(here)
    return output.getvalue()


@pytest.mark.parametrize("gpu", ["a800", "h800"])
def test_the_plans_are_current(gpu: str) -> None:
    blocks = dict(BLOCK.findall(DOC.read_text(encoding="utf-8")))
    (arguments,) = [key for key in blocks if gpu in key]
    assert blocks[arguments] == printed(arguments)


if __name__ == "__main__":
    text = DOC.read_text(encoding="utf-8")
    fresh = BLOCK.sub(lambda m: f"```\n$ matpo {m[1]}\n{printed(m[1])}```\n", text)
    DOC.write_text(fresh, encoding="utf-8")
