"""Transport `broadcast`: flat buckets from trainer rank 0 through a process group with the engines.

The next bucket is exported and flattened while the present one is sent and the one before is loaded
by the engines; at most two buckets are alive.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_matpo.obs.spans import RECEIVE, span
from megatron_matpo.types import PolicyVersion
from megatron_matpo.weight_sync.buckets import Bucket, make_buckets
from megatron_matpo.weight_sync.engines import Engines
from megatron_matpo.weight_sync.group import form_group, leave_group, open_store

T = TypeVar("T")
POLL_S = 0.0005
"""How often a running broadcast is looked at; small against any bucket worth sending."""


class BroadcastTransport:
    """NCCL on GPUs, gloo on CPUs."""

    def __init__(
        self,
        *,
        bucket_bytes: int,
        ranks_per_engine: int,
        host: str,
        port: int,
        backend: str,
        flush_cache: bool = True,
    ) -> None:
        """Keep the arguments; `host` and `port` are where the group meets, on this rank.

        `flush_cache`: engines forget cached prefixes with the last bucket.
        """
        self._bucket_bytes = bucket_bytes
        self._ranks_per_engine = ranks_per_engine
        self._host, self._port, self._backend = host, port, backend
        self._flush_cache = flush_cache
        self._store: c10d.Store | None = None
        self._group: dist.ProcessGroup | None = None
        self._group_name = ""
        # One thread: the export is a sequence of collectives, whose order must not change.
        self._exporter = ThreadPoolExecutor(1, "weight-export", _use_device_of_this_thread())
        self._buckets: Iterator[Bucket] = iter(())
        self._first: Bucket | None = None

    async def connect(self, engines: Engines) -> None:
        """Form the group with these engines; the one before is left.

        Raises:
            WeightSyncError: an engine refused to join, or did not come inside the deadline.
        """
        self._leave()
        # Unique, so that a second attempt never meets the keys or the group of a failed one.
        self._group_name = name = f"matpo_weights_{secrets.token_hex(4)}"
        if self._store is None:
            self._store = open_store(self._host, self._port, engines.timeout_s)
        store = self._store
        world_size = 1 + self._ranks_per_engine * len(engines.clients)
        joins = {
            engine.url: engine.init_weights_update_group(
                master_address=self._host,
                master_port=self._port,
                rank_offset=1 + i * self._ranks_per_engine,
                world_size=world_size,
                group_name=name,
                backend=self._backend,
                deadline_s=engines.request_s,
            )
            for i, engine in enumerate(engines.clients)
        }
        own = _in_daemon_thread(
            lambda: form_group(
                host=self._host,
                port=self._port,
                world_size=world_size,
                backend=self._backend,
                name=name,
                timeout_s=engines.timeout_s,
                store=store,
            )
        )
        what = "forming the weight-sync group"
        self._group, *_ = await engines.together(what, {"trainer rank 0": own, **joins})

    async def prepare(self, version: PolicyVersion, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Make the first bucket."""
        self._buckets = make_buckets(tensors, self._bucket_bytes)
        self._first = await self._next()

    async def deliver(self, version: PolicyVersion, engines: Engines) -> int:
        """Send all buckets.

        Raises:
            WeightSyncError: names the bucket, and who failed or is late.
        """
        bucket, self._first = self._first, None
        num_bytes = index = 0
        before: dict[str, asyncio.Task[None]] = {}
        while bucket is not None:
            what = f"bucket {index} (from {bucket.names[0]})"
            receives = self._receives(bucket, version, engines)
            # The requests are on their way before this thread's interpreter is shared.
            sent = asyncio.ensure_future(self._broadcast(bucket))
            await asyncio.sleep(0)
            upcoming = asyncio.ensure_future(self._next())
            waits = {"trainer rank 0": sent, "the trainer's export": upcoming, **before}
            with span("bucket", bytes=bucket.data.nbytes):
                await engines.together(what, waits, receives.items())
            num_bytes += bucket.data.numel()
            bucket = upcoming.result()
            before, index = receives, index + 1
        await engines.together(f"bucket {index - 1}, the last one", before)
        return num_bytes

    async def abandon(self) -> None:
        """Leave the group, which may be broken, and see the export to its end.

        Engines that wait in the group get an error, unless they wait for another one of them.
        """
        self._leave()
        self._first = None
        await asyncio.get_running_loop().run_in_executor(self._exporter, _exhaust, self._buckets)

    def _leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            # On GPUs it may wait for work that never ends.
            _in_daemon_thread(lambda: leave_group(group))

    async def close(self) -> None:
        """End the exporting thread once it is idle."""
        self._exporter.shutdown(wait=False, cancel_futures=True)

    def _receives(
        self, bucket: Bucket, version: PolicyVersion, engines: Engines
    ) -> dict[str, asyncio.Task[None]]:
        """Ask every engine to receive; SGLang takes such requests one after another."""
        return {
            engine.url: asyncio.ensure_future(
                _timed(
                    number,
                    engine.update_weights_from_distributed(
                        names=bucket.names,
                        dtypes=bucket.dtypes,
                        shapes=bucket.shapes,
                        group_name=self._group_name,
                        # An engine takes the version with the bucket: the last one carries it.
                        weight_version=str(version) if bucket.is_last else None,
                        load_format="flattened_bucket",
                        flush_cache=bucket.is_last and self._flush_cache,
                        # It can wait for the bucket before.
                        deadline_s=2 * engines.request_s,
                    ),
                )
            )
            for number, engine in enumerate(engines.clients)
        }

    async def _next(self) -> Bucket | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._exporter, next, self._buckets, None)

    async def _broadcast(self, bucket: Bucket) -> None:
        work = dist.broadcast(bucket.data, src=0, group=self._group, async_op=True)
        assert work is not None, "rank 0 is a member of the group"
        while not work.is_completed():
            await asyncio.sleep(POLL_S)
        work.wait()


def _exhaust(buckets: Iterator[Bucket]) -> None:
    for _ in buckets:
        pass


def _use_device_of_this_thread() -> Callable[[], None]:
    """CUDA's current device belongs to a thread; another one would begin with device 0."""
    if not torch.cuda.is_initialized():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)


async def _timed(index: int, wait: Awaitable[None]) -> None:
    """`wait`, with a span that names the engine: `obs.why` looks for slow ones."""
    with span(RECEIVE, engine=index):
        await wait


def _in_daemon_thread(function: Callable[[], T]) -> Awaitable[T]:
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

    threading.Thread(target=work, name="weight-sync-group", daemon=True).start()
    return future
