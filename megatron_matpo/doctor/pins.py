"""Which versions this package asks for: read from its own installed metadata."""

from __future__ import annotations

import functools
import importlib.metadata
import re

_PIN = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==([^;\s]+)")


@functools.cache
def pins() -> dict[str, str]:
    """Package -> exact version, of all extras; those without an exact version are left out."""
    found: dict[str, str] = {}
    for requirement in importlib.metadata.requires("megatron_matpo") or []:
        if match := _PIN.match(requirement):
            found[match[1].lower().replace("_", "-")] = match[2]
    return found


def same_version(have: str, want: str) -> bool:
    """Whether `have` is the release `want`, whatever the build (`2.13.0+cu130` is `2.13.0`)."""
    return have.partition("+")[0] == want.partition("+")[0]
