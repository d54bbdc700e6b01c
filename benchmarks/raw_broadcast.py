"""What weight pushes are measured against: the same bytes to processes that only receive.

The group has the shape of the push's (gloo, rank 0 sends to the others), every buffer is allocated
and written before, and nothing else is done with what arrives.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_matpo.ports import free_ports
from megatron_matpo.weight_sync.group import form_group

_LIMIT_S = 300.0


def _join(rank: int, size: int, port: int) -> dist.ProcessGroup:
    return form_group(
        host="127.0.0.1",
        port=port,
        world_size=size,
        backend="gloo",
        name=f"raw{port}",
        timeout_s=_LIMIT_S,
        rank=rank,
    )


def _receive(rank: int, size: int, port: int, sizes: Sequence[int]) -> None:
    torch.set_num_threads(1)
    group = _join(rank, size, port)
    buffers = [torch.zeros(count, dtype=torch.uint8) for count in sizes]
    is_over = torch.zeros(1)
    while True:
        dist.broadcast(is_over, src=0, group=group)
        if is_over:
            return
        for buffer in buffers:
            dist.broadcast(buffer, src=0, group=group)
        dist.barrier(group=group)


class RawBroadcast:
    """A group with `num` bare receivers; use it with `with`."""

    def __init__(self, buckets: Sequence[Tensor], num: int) -> None:
        """Each of `buckets` is one broadcast."""
        self._buckets, self._num = buckets, num
        self._receivers: list[multiprocessing.process.BaseProcess] = []

    def __enter__(self) -> RawBroadcast:
        """Start the receivers, and send once to warm up."""
        (port,) = free_ports("127.0.0.1", 1)
        context = multiprocessing.get_context("spawn")
        sizes = [bucket.nbytes for bucket in self._buckets]
        for rank in range(1, self._num + 1):
            receiver = context.Process(
                target=_receive, args=(rank, self._num + 1, port, sizes), daemon=True
            )
            receiver.start()
            self._receivers.append(receiver)
        self._group = _join(0, self._num + 1, port)
        self.seconds()
        return self

    def __exit__(self, *_: object) -> None:
        """End the receivers."""
        dist.broadcast(torch.ones(1), src=0, group=self._group)
        for receiver in self._receivers:
            receiver.join()

    def seconds(self) -> float:
        """Send everything once; until the last receiver has it."""
        dist.broadcast(torch.zeros(1), src=0, group=self._group)
        started = time.perf_counter()
        for bucket in self._buckets:
            dist.broadcast(bucket, src=0, group=self._group)
        dist.barrier(group=self._group)
        return time.perf_counter() - started
