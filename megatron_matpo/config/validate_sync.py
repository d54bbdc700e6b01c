"""Violations in the section `weight_sync`, and of what engines must not be for it."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_matpo.config.root import Config

_QUANTIZATION = "--quantization"


def check_sync(config: Config) -> Iterator[str]:
    """Violations that the configuration alone shows; for commands that push weights."""
    for argument in config.rollout.engine_args:
        if argument.split("=")[0] == _QUANTIZATION:
            yield (
                f"rollout.engine_args has {argument}: quantizing engines of SGLang 0.5.20 do not "
                "take new weights correctly (docs/weight_sync.md); leave it out"
            )
