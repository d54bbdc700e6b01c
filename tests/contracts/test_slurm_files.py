"""Proves that slurm/*.sbatch are what `matpo launch --write` writes, and are clean shell.

After a change: `python tests/contracts/test_slurm_files.py` writes them anew. For a new one: the
command in the head of any of them, with another recipe and file.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_matpo.__main__ import main

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "slurm").glob("*.sbatch"))
SHELL = [*FILES, *sorted((ROOT / "megatron_matpo" / "launch").glob("*.sh"))]
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


def test_there_are_some():
    assert {file.stem for file in FILES} >= {"quickstart"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_files_are_current(file: Path):
    assert written_anew(file) == file.read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_the_shell_is_clean(file: Path):
    # The parts are checked for their variables where they are put together.
    parts = ["--exclude=SC2154"] if file.suffix == ".sh" else []
    command = ["shellcheck", "--shell=bash", *parts, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


if __name__ == "__main__":
    os.chdir(ROOT)
    for path in FILES:
        path.write_text(written_anew(path), encoding="utf-8")
