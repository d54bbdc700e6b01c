"""Who sends: the first rank of every pipeline stage, through a group of its own with all engines.

So no stage's tensors pass through another rank. Rank 0 talks to the engines and says who is next;
how it reaches the senders of later stages is in `remote_stages.py`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_matpo.weight_sync.buckets import Bucket, make_buckets
from megatron_matpo.weight_sync.group import form_group, leave_group, open_store

T = TypeVar("T")
POLL_S = 0.002
"""How often a running broadcast is looked at; small against any bucket worth sending."""


@dataclass(frozen=True)
class Meeting:
    """Where a sender and the engines form their group; the store is rank 0's."""

    host: str
    port: int
    world_size: int
    backend: str
    name: str
    timeout_s: float


class Stage(Protocol):
    """A sender, as rank 0 sees it."""

    @property
    def who(self) -> str:
        """Names it in errors."""
        ...

    async def form(self, meeting: Meeting) -> None:
        """Form the group, while the engines join."""
        ...

    async def next(self) -> Bucket | None:
        """The next bucket (elsewhere without its parts); None after the last."""
        ...

    async def send(self) -> None:
        """Broadcast the oldest bucket of those that `next` gave and that are not sent."""
        ...


class LocalStage:
    """This rank as a sender."""

    def __init__(self, rank: int, bucket_bytes: int, *, flat: bool) -> None:
        """Nothing is formed before `form`; `flat`: buckets are."""
        self.who = f"trainer rank {rank}"
        self._rank, self._bucket_bytes, self._flat = rank, bucket_bytes, flat
        self._store: c10d.Store | None = None
        self._group: dist.ProcessGroup | None = None
        # One thread: the export is a sequence of collectives, whose order must not change.
        self._exporter = ThreadPoolExecutor(1, "weight-export", use_device_of_this_thread())
        self._buckets: Iterator[Bucket] = iter(())
        self._unsent: list[Bucket] = []

    async def form(self, meeting: Meeting) -> None:
        """See `Stage.form`; rank 0 serves the store. The group before is left."""
        self.leave()
        if self._store is None:
            host, port, limit_s = meeting.host, meeting.port, meeting.timeout_s
            is_master = self._rank == 0
            self._store = await in_daemon_thread(
                lambda: open_store(host, port, limit_s, is_master=is_master)
            )
        store = self._store
        self._group = await in_daemon_thread(
            lambda: form_group(
                host=meeting.host,
                port=meeting.port,
                world_size=meeting.world_size,
                backend=meeting.backend,
                name=meeting.name,
                timeout_s=meeting.timeout_s,
                store=store,
            )
        )

    def begin(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Send these tensors from now on."""
        self._buckets = make_buckets(tensors, self._bucket_bytes, flat=self._flat)
        self._unsent = []

    async def next(self) -> Bucket | None:
        """See `Stage.next`."""
        loop = asyncio.get_running_loop()
        bucket = await loop.run_in_executor(self._exporter, next, self._buckets, None)
        if bucket is not None:
            self._unsent.append(bucket)
        return bucket

    async def send(self) -> None:
        """See `Stage.send`."""
        bucket = self._unsent.pop(0)
        works = [
            dist.broadcast(part, src=0, group=self._group, async_op=True) for part in bucket.parts
        ]
        for work in works:
            assert work is not None, "the sender is a member of the group"
            while not work.is_completed():
                await asyncio.sleep(POLL_S)
            work.wait()

    def leave(self) -> None:
        """Leave the group, which may be broken."""
        group, self._group = self._group, None
        if group is not None:
            # On GPUs it may wait for work that never ends.
            in_daemon_thread(lambda: leave_group(group))

    async def abandon(self) -> None:
        """Leave the group, and see the export to its end.

        Engines that wait in the group get an error, unless they wait for another one of them.
        """
        self.leave()
        self._unsent = []
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._exporter, _exhaust, self._buckets)

    def close(self) -> None:
        """End the exporting thread once it is idle."""
        self._exporter.shutdown(wait=False, cancel_futures=True)


def _exhaust(buckets: Iterator[Bucket]) -> None:
    for _ in buckets:
        pass


def in_daemon_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Await a blocking call without keeping the process alive for it if it never returns."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        try:
            result, error = function(), None
        except BaseException as caught:
            result, error = None, caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=work, name="weight-sync-wait", daemon=True).start()
    return future


def use_device_of_this_thread() -> Callable[[], None]:
    """CUDA's current device belongs to a thread; another one would begin with device 0."""
    if not torch.cuda.is_initialized():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)
