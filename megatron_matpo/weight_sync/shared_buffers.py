"""Memory that a trainer rank writes and an engine on the same machine opens, and how it is told.

What an engine gets is a pickle of names and numbers that stock SGLang (0.5.20) opens with its own
restricted unpickler (`utils/common.py: SafeUnpickler`). Nothing on our side unpickles anything.

* On a CPU a buffer is an anonymous file (memfd), opened by its path below /proc: it has no name in
  /dev/shm, so nothing is left when a process is killed. Both sides must see the same /proc, and run
  as the same user.
* On a GPU it is device memory, opened through a CUDA IPC handle. torch keeps a small file of
  reference counts in /dev/shm for these, which a killed process may leave.
"""

from __future__ import annotations

import functools
import os
import pickle
import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Named = Sequence[tuple[str, Tensor]]
_STORAGE_DEVICE = 6
"""Place of the device among the arguments of torch's `rebuild_cuda_tensor`."""


class SharedBuffer(Protocol):
    """Bytes that a bucket is written into, again and again."""

    data: Tensor
    """[capacity] uint8."""

    def opened(self, num_bytes: int) -> Any:
        """What unpickles in the engine as a uint8 tensor of the first `num_bytes`."""
        ...

    def close(self) -> None:
        """Free the memory; an engine that still has it open keeps its own view."""
        ...


MakeBuffer = Callable[[int], SharedBuffer]
"""Number of bytes -> a buffer of at least that many."""


class _Call:
    """Pickles as a call: the engine gets what `function(*args)` returns there."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


class HostBuffer:
    """Host memory, for engines on CPUs of this machine."""

    def __init__(self, num_bytes: int) -> None:
        """Make it; pages are taken as they are written."""
        self._file = os.memfd_create("matpo-weights", os.MFD_CLOEXEC)
        os.ftruncate(self._file, num_bytes)
        # An engine is another process: the path names ours.
        self._path = f"/proc/{os.getpid()}/fd/{self._file}"
        self.data = torch.from_file(self._path, shared=True, size=num_bytes, dtype=torch.uint8)

    def opened(self, num_bytes: int) -> Any:
        """`torch.from_file` of the same file."""
        # An argument by keyword, which a pickled call does not have.
        open_file = functools.partial(torch.from_file, dtype=torch.uint8)
        return _Call(open_file, (self._path, True, num_bytes))

    def close(self) -> None:
        """The memory is free when no engine has it mapped either."""
        self.data = torch.empty(0, dtype=torch.uint8)
        os.close(self._file)


class DeviceBuffer:
    """Memory of this rank's GPU, for an engine's rank on the same GPU."""

    def __init__(self, num_bytes: int) -> None:
        """Allocate it on the current device."""
        self.data = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")

    def opened(self, num_bytes: int) -> Any:
        """What torch's multiprocessing sends: CUDA IPC handles of the memory and of an event.

        The event makes the engine's stream wait for what was written here. The device is named by
        its UUID, as SGLang does (`utils/patch_torch.py`): the two may number devices differently.
        """
        from torch.multiprocessing.reductions import reduce_tensor

        function: Callable[..., Any]
        args: tuple[Any, ...]
        function, args = reduce_tensor(self.data[:num_bytes])  # pyright: ignore[reportAssignmentType]
        uuid = str(torch.cuda.get_device_properties(args[_STORAGE_DEVICE]).uuid)
        return _Call(function, (*args[:_STORAGE_DEVICE], uuid, *args[_STORAGE_DEVICE + 1 :]))

    def close(self) -> None:
        """Give the memory back to the device, not only to torch."""
        self.data = torch.empty(0, dtype=torch.uint8)
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


def write(buffer: SharedBuffer, tensors: Named) -> bytes:
    """Put `tensors`, of one dtype, one after another into `buffer`; what an engine has to be told.

    The form is that of SGLang's `load_format="flattened_bucket"` (`weight_sync/tensor_bucket.py`,
    which reads attributes of the metadata).
    """
    metadata: list[types.SimpleNamespace] = []
    at = 0
    for name, tensor in tensors:
        end = at + tensor.nbytes
        buffer.data[at:end].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        metadata.append(
            types.SimpleNamespace(
                name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                start_idx=at,
                end_idx=end,
                numel=end - at,
            )
        )
        at = end
    return pickle.dumps({"flattened_tensor": buffer.opened(at), "metadata": metadata}, protocol=4)
