"""Rotary position settings of a Hugging Face `config.json`. Torch-free.

transformers 5 writes them as `rope_parameters`, older releases as `rope_scaling` beside a
`rope_theta` at the top. Kinds that are not listed here change the mathematics and are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How the inverse frequencies are stretched for long contexts."""

    rope_type: str
    """`linear`: all divided by `factor`. `llama3`: by wavelength, with the fields below."""
    factor: float
    low_freq_factor: float = 1.0
    """Wavelengths beyond `original_max_positions / low_freq_factor` are divided by `factor`."""
    high_freq_factor: float = 4.0
    """Wavelengths below `original_max_positions / high_freq_factor` stay."""
    original_max_positions: int = 0
    """Context length of the pretraining."""


def rope_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """The settings under either spelling; empty if there are none."""
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def rope_type(raw: dict[str, Any]) -> str:
    """Kind of scaling; `default` is none."""
    fields = rope_fields(raw)
    return str(fields.get("rope_type", fields.get("type", "default")))


def rope_problems(raw: dict[str, Any]) -> list[str]:
    """What the trainer would compute differently; one line each."""
    fields = rope_fields(raw)
    kind = rope_type(raw)
    problems: list[str] = []
    if kind not in SUPPORTED_ROPE_TYPES:
        problems.append(f"rope_type={kind!r} (only {', '.join(SUPPORTED_ROPE_TYPES)})")
    partial = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        problems.append(f"partial_rotary_factor={partial!r} (only 1.0)")
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    missing = [name for name in needed.get(kind, ()) if fields.get(name) is None]
    if missing:
        problems.append(f"rope_type={kind!r} without {', '.join(missing)}")
    return problems


def read_scaling(raw: dict[str, Any]) -> RopeScaling | None:
    """Settings that `rope_problems` found nothing wrong with; None without scaling."""
    fields, kind = rope_fields(raw), rope_type(raw)
    if kind == "default":
        return None
    factor = float(fields["factor"])
    if kind == "linear":
        return RopeScaling(kind, factor)
    # transformers falls back to the present context length, too.
    original = fields.get("original_max_position_embeddings") or raw["max_position_embeddings"]
    return RopeScaling(
        kind,
        factor,
        float(fields["low_freq_factor"]),
        float(fields["high_freq_factor"]),
        int(original),
    )
