"""How much of this rank's device is free, and waiting until what the other side had is free."""

from __future__ import annotations

import time

import torch

from megatron_matpo.config import Config
from megatron_matpo.errors import HandoverError

_POLL_S = 0.05
_GIB = 2**30
_SLACK_BYTES = 256 << 20
"""Of what another process gave back so much may be gone again: its allocations differ a little."""


class DeviceMemory:
    """A GPU, as its driver counts it, with the memory of all processes."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s` is `weight_sync.timeout_s`."""
        self._timeout_s = timeout_s

    def free_bytes(self) -> int:
        """Free memory of the current device."""
        free, _ = torch.cuda.mem_get_info()
        return free

    def wait_free(self, num_bytes: int, what: str) -> int:
        """Return when so much is free; how much it is then.

        Raises:
            HandoverError: it is not, inside the deadline; names the device and `what` should be
                free.
        """
        needed = num_bytes - _SLACK_BYTES
        end = time.monotonic() + self._timeout_s
        while (free := self.free_bytes()) < needed:
            if time.monotonic() > end:
                device = torch.cuda.current_device()
                raise HandoverError(
                    f"device {device}: {what} needs {num_bytes / _GIB:.2f} GiB, {free / _GIB:.2f} "
                    f"GiB are free after {self._timeout_s:g} s (weight_sync.timeout_s="
                    f"{self._timeout_s:g}): the other side did not give its memory back, or "
                    "another process uses this device"
                )
            time.sleep(_POLL_S)
        return free


class HostOnly(DeviceMemory):
    """On a CPU trainer and engines share the host's memory, of which nothing can be told apart.

    What is confirmed is the engines' own answer that they gave theirs back.
    """

    def __init__(self) -> None:
        """Nothing is measured, so nothing is waited for."""
        super().__init__(0.0)

    def free_bytes(self) -> int:
        """Not known: 0."""
        return 0

    def wait_free(self, num_bytes: int, what: str) -> int:
        """Nothing to wait for."""
        return 0


def device_memory(config: Config) -> DeviceMemory:
    """Of this rank's device."""
    if config.cluster.device == "cpu":
        return HostOnly()
    return DeviceMemory(config.weight_sync.timeout_s)
