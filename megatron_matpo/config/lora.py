"""Section `lora`: train low-rank adapters beside frozen weights."""

from __future__ import annotations

from dataclasses import dataclass, field

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers that can have an adapter, by their Hugging Face names."""
ALL = "all"


@dataclass(frozen=True)
class LoraConfig:
    """W + alpha / rank * B A instead of W, with W frozen (arXiv:2106.09685)."""

    rank: int = 0
    """Rows of A and columns of B; 0: no adapters, every weight is trained."""
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: [ALL])
    """Hugging Face names of the layers with adapters, or `all`."""

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that `targets` means, in the order of `TARGETS`; none without adapters."""
        if not self.rank:
            return ()
        return tuple(name for name in TARGETS if name in self.targets or ALL in self.targets)
