"""What a push needs of a transport, and what it says of itself afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_matpo.types import PolicyVersion
from megatron_matpo.weight_sync.engines import Engines

Export = Callable[[], Iterator[tuple[str, Tensor]]]


class Transport(Protocol):
    """How the weights come to the engines. Rank 0 calls all but `follow`, the others that alone."""

    async def connect(self, engines: Engines) -> None:
        """Form what is needed to reach these engines; what was formed before is left."""
        ...

    async def prepare(self, version: PolicyVersion, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """What can be done while the engines still generate."""
        ...

    async def deliver(self, version: PolicyVersion, engines: Engines) -> int:
        """Give paused engines all tensors of `prepare`, the version with the last of them.

        Returns:
            Bytes that each engine got.
        """
        ...

    def follow(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """The part of a push that a rank has to play which does not talk to the engines.

        Raises:
            WeightSyncError: the push failed, here or on rank 0; the export has ended.
        """
        ...

    async def abandon(self, engines: Engines) -> None:
        """Let go of what is broken, and see the export to its end: `deliver` was not done.

        Raises:
            WeightSyncError: another rank does not end its part in time.
        """
        ...

    async def close(self) -> None:
        """Release what `connect` and `prepare` took."""
        ...


@dataclass(frozen=True)
class PushReport:
    """What one push took (seconds)."""

    num_bytes: int = 0
    prepare_s: float = 0.0
    deliver_s: float = 0.0
    verify_s: float = 0.0
    pause_s: float = 0.0
    """For so long no engine sampled: from the first request to pause to the last one resumed."""

    @property
    def metrics(self) -> dict[str, float]:
        """`sync/...` of a step; see docs/metrics.md."""
        return {
            "sync/bytes": self.num_bytes,
            "sync/prepare_s": self.prepare_s,
            "sync/deliver_s": self.deliver_s,
            "sync/verify_s": self.verify_s,
            "sync/pause_s": self.pause_s,
            "sync/gb_per_s": self.num_bytes / (self.prepare_s + self.pause_s) / 1e9,
        }
