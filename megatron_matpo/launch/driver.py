"""Asks NVIDIA's driver for this machine's GPUs, without torch."""

from __future__ import annotations

import re
import subprocess

from megatron_matpo.config.gpus import Capability

_COMMAND = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
_DEADLINE_S = 10.0


def ask_driver() -> Capability | None:
    """The lowest compute capability of this machine's GPUs; None if nobody can tell."""
    try:
        done = subprocess.run(
            _COMMAND, capture_output=True, text=True, timeout=_DEADLINE_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return lowest_capability(done.stdout)


def lowest_capability(listing: str) -> Capability | None:
    """Of nvidia-smi's lines, one `major.minor` per GPU; other lines are skipped."""
    found = re.findall(r"^\s*(\d+)\.(\d+)\s*$", listing, flags=re.MULTILINE)
    return min(((int(major), int(minor)) for major, minor in found), default=None)
