"""A second set of weights on the host that takes the place of the model's for a while.

There is one host copy, not two: a swap exchanges every parameter with its place on the host, so the
model's own values rest there until the swap back. Only parameter memory is written, in place: DDP's
flat buffers and the optimizer keep their views, and the optimizer's fp32 copies are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class HostWeights:
    """A copy of this rank's parameters, exchangeable with them."""

    def __init__(self, models: Sequence[Any]) -> None:
        """Copy the parameters of `models` as they are now, into pinned memory beside a GPU."""
        parameters = {id(p): p for model in models for p in model.parameters()}
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for parameter in parameters.values():
            host = torch.empty_like(
                parameter,
                device="cpu",
                requires_grad=False,
                memory_format=torch.contiguous_format,
                pin_memory=parameter.is_cuda,
            )
            self._pairs.append((parameter, host.copy_(parameter.detach())))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The kept weights are the model's inside the block, and its own ones again after it.

        Nothing may update the parameters inside. Local to this rank: every rank that shares a
        forward pass must do the same.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Parameter by parameter; on a GPU in the order of its stream, so nothing has to wait."""
        for parameter, host in self._pairs:
            own = parameter.detach().clone()
            parameter.copy_(host, non_blocking=True)
            host.copy_(own, non_blocking=True)
