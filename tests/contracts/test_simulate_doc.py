"""Proves that the simulation in docs/simulate.md is what the command prints.

After a change of the model: `python tests/contracts/test_simulate_doc.py` writes it anew.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

from megatron_matpo.__main__ import main

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "simulate.md"
BLOCK = re.compile(r"```\n\$ matpo (simulate [^\n]*)\n(.*?)```\n", re.DOTALL)


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


def test_the_simulation_is_current() -> None:
    ((arguments, said),) = BLOCK.findall(DOC.read_text(encoding="utf-8"))
    assert "matpo-qwen3-14b-16n8g-a800.yaml" in arguments
    assert said == printed(arguments)


if __name__ == "__main__":
    text = DOC.read_text(encoding="utf-8")
    fresh = BLOCK.sub(lambda m: f"```\n$ matpo {m[1]}\n{printed(m[1])}```\n", text)
    DOC.write_text(fresh, encoding="utf-8")
