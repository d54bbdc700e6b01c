"""The part of a trainer's memory that it needs only while it trains, moved to the host and back.

* Gradient buffers hold nothing between updates: Megatron gives their memory back and takes it
  again, zeroed, under the same views (`DistributedDataParallel.offload_grad_buffers`).
* fp32 parameters and moments of the optimizer go to host memory, pinned beside a GPU. The tensors
  stay the same objects and point there meanwhile, so a checkpoint reads them as ever. Not by
  Megatron's `offload_to_cpu`: it moves fp32 parameters that are views of the model's own, which an
  update would no longer reach, and takes new unpinned memory every time.

What stays on the device is the model's parameters: weight pushes and exports read them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_matpo.megatron.optimizer_state import members_of

_CHUNK_BYTES = 256 << 20
"""torch rounds pinned memory up to a power of two, so tensors share chunks of such a size."""
_ALIGNMENT = 64


class Parking:
    """This rank's gradients and optimizer state. Nothing is communicated."""

    def __init__(self, models: Sequence[Any], optimizer: MegatronOptimizer) -> None:
        """Keep the parts; host memory is taken at the first `park`, and kept."""
        self._models, self._optimizer = models, optimizer
        self._host: dict[int, Tensor] = {}
        self._devices: list[tuple[Tensor, torch.device]] = []
        self.is_parked = False

    def park(self) -> int:
        """Free the device's memory.

        Returns:
            Bytes that the device has more: on a GPU also what torch's allocator kept of the work
            since the last time.
        """
        assert not self.is_parked, "unpark comes between"
        # Gradients of the optimizer's parameters are views of the buffers.
        self._optimizer.zero_grad()
        moved = sum(
            buffer.grad_data.nbytes
            for model in self._models
            for buffer in (*model.buffers, *model.expert_parallel_buffers)
        )
        reserved = _reserved()
        tensors = list(self._state())
        if not self._host:
            self._host = _host_copies(tensors)
        for tensor in tensors:
            self._host[id(tensor)].copy_(tensor.data, non_blocking=True)
        if _is_on_gpu():
            torch.cuda.synchronize()
        for tensor in tensors:
            self._devices.append((tensor, tensor.device))
            tensor.data = self._host[id(tensor)]
        with warnings.catch_warnings():
            # Megatron's own use of typed storages, which torch has deprecated.
            warnings.simplefilter("ignore", UserWarning)
            for model in self._models:
                model.offload_grad_buffers()
        self.is_parked = True
        moved += sum(tensor.nbytes for tensor in tensors)
        return reserved - _reserved() if _is_on_gpu() else moved

    def unpark(self) -> None:
        """Everything as before `park`, gradients empty."""
        assert self.is_parked, "park comes before"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for model in self._models:
                model.restore_grad_buffers()
        for tensor, device in self._devices:
            tensor.data = tensor.data.to(device, non_blocking=True, copy=True)
        if _is_on_gpu():
            # The host's copy may be written again from now on.
            torch.cuda.synchronize()
        self._devices = []
        self.is_parked = False

    def _state(self) -> Iterator[Tensor]:
        """The optimizer's tensors on the model's device that are not the model's own memory."""
        parameters = [p for model in self._models for p in model.parameters()]
        own = {p.untyped_storage().data_ptr() for p in parameters}
        device = parameters[0].device
        for member in members_of(self._optimizer):
            inner = member.optimizer
            if inner is None:
                continue
            tensors = [p for group in inner.param_groups for p in group["params"]]
            tensors += [value for state in inner.state.values() for value in state.values()]
            for tensor in {id(t): t for t in tensors if isinstance(t, Tensor)}.values():
                # What is on the host already (`optim.offload`) stays there.
                is_elsewhere = tensor.device != device or tensor.numel() == 0
                if not is_elsewhere and tensor.untyped_storage().data_ptr() not in own:
                    yield tensor


def _host_copies(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """For every tensor (by id) room on the host, of its shape and type."""
    copies: dict[int, Tensor] = {}
    chunk, used = torch.empty(0, dtype=torch.uint8), 0
    left = sum(_padded(tensor) for tensor in tensors)
    for tensor in tensors:
        if used + tensor.nbytes > chunk.numel():
            size = max(_padded(tensor), min(_CHUNK_BYTES, left))
            chunk, used = torch.empty(size, dtype=torch.uint8, pin_memory=_is_on_gpu()), 0
        flat = chunk[used : used + tensor.nbytes]
        copies[id(tensor)] = flat.view(tensor.dtype).view(tensor.shape)
        used += _padded(tensor)
        left -= _padded(tensor)
    return copies


def _padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _is_on_gpu() -> bool:
    return torch.cuda.is_initialized()


def _reserved() -> int:
    """What torch's allocator holds of the device."""
    return torch.cuda.memory_reserved() if _is_on_gpu() else 0
