"""Section `fp8`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fp8Config:
    """How matrix products are done in FP8, where `precision` says that they are."""

    recipe: str = "auto"
    """`auto | tensorwise | delayed | blockwise | mxfp8`: the scaling of Transformer Engine; auto
    takes the finest that the device has."""
    first_last_layers_bf16: int = 0
    """Layers at the beginning, and as many at the end, that stay in bf16."""
    params: bool = False
    """Keep the weights themselves in FP8 (the optimizer's fp32 copies stay as they are)."""
