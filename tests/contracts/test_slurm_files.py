"""Proves that slurm/*.sbatch are what `matpo launch --write` writes, and are clean shell.

After a change: `python tests/contracts/test_slurm_files.py` writes them anew. For a new one: the
command in the head of any of them, with another recipe and file.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_matpo.__main__ import main
from megatron_matpo.config.load import load_recipe
from megatron_matpo.config.validate import check_supported
from tests.helpers.shell import shellcheck

ROOT = Path(__file__).parents[2]
READY = sorted((ROOT / "slurm").glob("*.sbatch"))
# Of recipes that no run accepts yet.
GOLDEN = sorted((ROOT / "tests" / "unit" / "recipes" / "golden").glob("*.sbatch"))
FILES = [*READY, *GOLDEN]
PARTS = sorted((ROOT / "megatron_matpo" / "launch").glob("*.sh"))
ORIGIN = re.compile(r"^# Written by: matpo (launch .*--write (\S+).*)$", re.MULTILINE)


def written_anew(file: Path) -> str:
    """The text that the command in the file's head writes; the file itself stays as it was."""
    before = file.read_text(encoding="utf-8")
    origin = ORIGIN.search(before)
    assert origin is not None
    assert ROOT / origin[2] == file
    with contextlib.chdir(ROOT):
        try:
            assert main(origin[1].split()) == 0
            return file.read_text(encoding="utf-8")
        finally:
            file.write_text(before, encoding="utf-8")


def test_every_recipe_of_a_cluster_has_one():
    recipes = {path.stem for path in (ROOT / "recipes").glob("*-[0-9]*n8g-*.yaml")}
    assert len(recipes) >= 13
    assert {file.stem for file in FILES} == {*recipes, "quickstart"}
    assert len(FILES) == len(recipes) + 1, "each is in one place"


def test_ready_ones_can_run():
    for file in FILES:
        config = load_recipe(str(ROOT / "recipes" / f"{file.stem}.yaml"), [])
        assert (not list(check_supported(config, config.command))) == (file in READY), file.stem


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_files_are_current(file: Path):
    assert written_anew(file) == file.read_text(encoding="utf-8")


@pytest.mark.skipif(shellcheck() is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("file", PARTS, ids=lambda file: file.name)
def test_the_parts_are_clean_shell(file: Path):
    # They are checked for their variables where they are put together (test_shell.py).
    command = [str(shellcheck()), "--shell=bash", "--exclude=SC2154", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


if __name__ == "__main__":
    os.chdir(ROOT)
    for path in FILES:
        path.write_text(written_anew(path), encoding="utf-8")
