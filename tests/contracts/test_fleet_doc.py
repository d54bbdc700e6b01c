"""Proves that the table of transitions in docs/fleet.md is the one of the code.

After a change of the table: `python tests/contracts/test_fleet_doc.py` writes it anew.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_matpo.rollout.health import State, table_markdown

DOC = Path(__file__).parents[2] / "docs" / "fleet.md"
BLOCK = re.compile(r"(<!-- table: [^\n]* -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)


def test_the_table_is_current() -> None:
    (found,) = BLOCK.findall(DOC.read_text(encoding="utf-8"))
    assert found[1] == table_markdown()


def test_every_state_is_explained() -> None:
    before = DOC.read_text(encoding="utf-8").split("<!-- table")[0]
    assert re.findall(r"^\| ([a-z]+) \| [a-z]", before, re.MULTILINE)[1:] == list(State)


if __name__ == "__main__":
    text = DOC.read_text(encoding="utf-8")
    DOC.write_text(BLOCK.sub(lambda m: m[1] + table_markdown() + m[3], text), encoding="utf-8")
