"""Violations in the section `data`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_matpo.config.root import Config


def check_data(config: Config) -> Iterator[str]:
    """Violations that the configuration alone shows."""
    yield from ()
