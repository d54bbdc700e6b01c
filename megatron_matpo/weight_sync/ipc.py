"""Transport `ipc`: flat buckets in memory that trainer and engines of one machine share.

Two buffers are written in turns: while the engines load out of one, the next bucket is exported
into the other. An engine's answer means that it is done with the buffer, on a GPU too: torch waits
for the engine's stream when the memory that it opened goes (`StorageSharing.cpp`), which is before
SGLang answers (`scheduler_components/weight_updater.py`).

On a GPU an engine's rank opens memory of its own device only, so the trainer rank on each of these
devices writes every bucket: all ranks take part (`follow`), and rank 0 collects what the engines
are to open. On a CPU rank 0 writes for all engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_matpo.obs.spans import span
from megatron_matpo.types import PolicyVersion
from megatron_matpo.weight_sync.broadcast import timed
from megatron_matpo.weight_sync.buckets import group_tensors
from megatron_matpo.weight_sync.engines import Engines
from megatron_matpo.weight_sync.shared_buffers import MakeBuffer, SharedBuffer, write
from megatron_matpo.weight_sync.stages import use_device_of_this_thread

_NUM_BUFFERS = 2


class TrainerRanks:
    """What the ranks that write buckets tell each other: bytes, over gloo."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """`group` has all trainer ranks in their order; waits are bounded by its timeout."""
        self._group = group

    def meet(self) -> None:
        """Go on when all ranks are here."""
        dist.barrier(group=self._group)

    def gather(self, own: bytes) -> list[bytes]:
        """What every rank brought, on rank 0; nothing elsewhere."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self._group.size())]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=self._group)
        longest = int(max(sizes).item())
        padded = torch.frombuffer(bytearray(own.ljust(longest, b"\0")), dtype=torch.uint8)
        is_first = self._group.rank() == 0
        parts = [torch.empty_like(padded) for _ in sizes] if is_first else None
        dist.gather(padded, parts, dst=dist.get_global_rank(self._group, 0), group=self._group)
        pairs = zip(parts or [], sizes, strict=False)
        return [part.numpy().tobytes()[: int(size.item())] for part, size in pairs]


@dataclass(frozen=True)
class _Filled:
    """A bucket that lies in a buffer."""

    first_name: str
    num_bytes: int
    is_last: bool
    payloads: Sequence[bytes]
    """By trainer rank, what an engine's rank has to be told to open it; on rank 0 only."""


class IpcTransport:
    """Memory shared with engines on this machine (GPU: on the same devices)."""

    def __init__(
        self,
        *,
        bucket_bytes: int,
        writers: Mapping[str, Sequence[int]],
        make_buffer: MakeBuffer,
        ranks: TrainerRanks | None = None,
        keeps_buffers: bool = True,
        flush_cache: bool = True,
    ) -> None:
        """Keep the arguments; memory is taken at the first push.

        Args:
            bucket_bytes: of a bucket; a larger tensor is one alone.
            writers: by engine (URL), for each of its ranks the trainer rank whose buffer it opens.
            make_buffer: makes this rank's buffers.
            ranks: with all trainer ranks; None: rank 0 alone writes.
            keeps_buffers: between pushes; not on a GPU, whose memory others need then.
            flush_cache: engines forget cached prefixes with the last bucket.
        """
        self._bucket_bytes = bucket_bytes
        self._writers = writers
        self._make_buffer = make_buffer
        self._ranks = ranks
        self._keeps_buffers = keeps_buffers
        self._flush_cache = flush_cache
        self._buffers: list[SharedBuffer | None] = [None] * _NUM_BUFFERS
        # One thread: the export is a sequence of collectives, whose order must not change.
        self._exporter = ThreadPoolExecutor(1, "weight-export", use_device_of_this_thread())
        self._buckets: Iterator[_Filled] = iter(())
        self._first: _Filled | None = None

    async def connect(self, engines: Engines) -> None:
        """Nothing to form: each request says what is to be opened."""

    async def prepare(self, version: PolicyVersion, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Write the first bucket."""
        self._buckets = self._filled(tensors)
        self._first = await self._next()

    async def deliver(self, version: PolicyVersion, engines: Engines) -> int:
        """Have all engines load every bucket.

        Raises:
            WeightSyncError: names the bucket, and who failed or is late.
        """
        bucket, self._first = self._first, None
        num_bytes = index = 0
        while bucket is not None:
            loads = self._loads(bucket, version, engines)
            # The requests are on their way before this thread's interpreter is shared.
            await asyncio.sleep(0)
            upcoming = asyncio.ensure_future(self._next())
            with span("bucket", bytes=bucket.num_bytes):
                await engines.together(
                    f"bucket {index} (from {bucket.first_name})",
                    {"the trainer's export": upcoming, **loads},
                )
            num_bytes += bucket.num_bytes
            bucket = upcoming.result()
            index += 1
        await asyncio.get_running_loop().run_in_executor(self._exporter, self._rest)
        return num_bytes

    def follow(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """A push on a rank other than 0: write what engines on its device are to open."""
        if self._ranks is None:
            for _ in tensors:
                pass
            return
        for _ in self._filled(tensors):
            pass
        self._rest()

    async def abandon(self, engines: Engines) -> None:
        """See the export to its end: every rank that writes waits for the others in it."""
        self._first = None

        def finish() -> None:
            for _ in self._buckets:
                pass
            self._rest()

        await asyncio.get_running_loop().run_in_executor(self._exporter, finish)

    async def close(self) -> None:
        """Free the buffers and end the exporting thread once it is idle."""
        self._exporter.shutdown(wait=False, cancel_futures=True)
        self._free()

    def _loads(
        self, bucket: _Filled, version: PolicyVersion, engines: Engines
    ) -> dict[str, asyncio.Task[None]]:
        return {
            engine.url: asyncio.ensure_future(
                timed(
                    number,
                    engine.update_weights_from_tensor(
                        payloads=[bucket.payloads[rank] for rank in self._writers[engine.url]],
                        # An engine takes the version with the bucket: the last one carries it.
                        weight_version=str(version) if bucket.is_last else None,
                        flush_cache=bucket.is_last and self._flush_cache,
                        deadline_s=engines.request_s,
                    ),
                )
            )
            for number, engine in enumerate(engines.clients)
        }

    async def _next(self) -> _Filled | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._exporter, next, self._buckets, None)

    def _filled(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[_Filled]:
        """Buckets one after another, the same on all ranks that write."""
        for index, (named, is_last) in enumerate(group_tensors(tensors, self._bucket_bytes)):
            if self._ranks is not None:
                # Rank 0 asks for a bucket when the engines have answered the one before the last:
                # from then on its buffer may be written again, on all ranks.
                self._ranks.meet()
            num_bytes = sum(tensor.nbytes for _, tensor in named)
            own = write(self._buffer(index % _NUM_BUFFERS, num_bytes), named)
            payloads = [own] if self._ranks is None else self._ranks.gather(own)
            yield _Filled(named[0][0], num_bytes, is_last, payloads)

    def _buffer(self, slot: int, num_bytes: int) -> SharedBuffer:
        """The buffer of a slot, which grows for a tensor that is larger than a bucket."""
        buffer = self._buffers[slot]
        if buffer is not None and buffer.data.numel() >= num_bytes:
            return buffer
        if buffer is not None:
            buffer.close()
        # Kept out of the list while it is made: a failure must not leave a closed one there.
        self._buffers[slot] = None
        buffer = self._buffers[slot] = self._make_buffer(max(num_bytes, self._bucket_bytes))
        return buffer

    def _rest(self) -> None:
        """After the engines' last answer."""
        if self._ranks is not None:
            self._ranks.meet()
        if not self._keeps_buffers:
            self._free()

    def _free(self) -> None:
        for slot, buffer in enumerate(self._buffers):
            if buffer is not None:
                self._buffers[slot] = None
                buffer.close()
