"""Transport `broadcast`: buckets from the trainer through process groups with the engines.

Rank 0 sends, and with pipeline parallelism the first rank of each later stage after it
(`stages.py`). The next bucket is exported while the present one is sent and the one before is
loaded by the engines; at most two buckets of a stage are alive. Over NCCL a bucket is flat, one
large transfer. Over gloo its tensors go one by one: flattening is a pass over memory on either
side, and there that takes a third of the time of sending.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from megatron_matpo.errors import WeightSyncError
from megatron_matpo.obs.spans import RECEIVE, span
from megatron_matpo.types import PolicyVersion
from megatron_matpo.weight_sync.buckets import Bucket
from megatron_matpo.weight_sync.engines import Engines
from megatron_matpo.weight_sync.remote_stages import RemoteStage
from megatron_matpo.weight_sync.stages import LocalStage, Meeting, Stage

Follow = Callable[[Iterator[tuple[str, Tensor]]], None]


def only_export(tensors: Iterator[tuple[str, Tensor]]) -> None:
    """The part of a rank that sends nothing: collectives of the export."""
    for _ in tensors:
        pass


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
        others: Sequence[RemoteStage] = (),
        follow: Follow = only_export,
        flush_cache: bool = True,
    ) -> None:
        """Keep the arguments; `host` and `port` are where the groups meet, on rank 0.

        Args:
            bucket_bytes: bound of a bucket.
            ranks_per_engine: tensor-parallel ranks of one engine.
            host: as the engines reach rank 0.
            port: of the store that all groups share.
            backend: `nccl` or `gloo`.
            others: on rank 0, the senders of the later pipeline stages in order.
            follow: what another rank does in a push.
            flush_cache: engines forget cached prefixes with the last bucket.
        """
        self._flush_cache = flush_cache
        self._ranks_per_engine = ranks_per_engine
        self._host, self._port, self._backend = host, port, backend
        self._local = LocalStage(0, bucket_bytes, flat=backend == "nccl")
        self._others = others
        self._stages: Sequence[Stage] = (self._local, *others)
        self._follow = follow
        self._group_name = ""
        self._first: Bucket | None = None

    async def connect(self, engines: Engines) -> None:
        """Form the groups with these engines, one after another; those before are left.

        Raises:
            WeightSyncError: an engine refused to join, or did not come inside the deadline.
        """
        # Unique, so that a second attempt never meets the keys or the group of a failed one.
        self._group_name = f"matpo_weights_{secrets.token_hex(4)}"
        for number, stage in enumerate(self._stages):
            meeting = Meeting(
                host=self._host,
                port=self._port,
                world_size=1 + self._ranks_per_engine * len(engines.clients),
                backend=self._backend,
                name=self._name(number),
                timeout_s=engines.timeout_s,
            )
            joins = {
                engine.url: engine.init_weights_update_group(
                    master_address=meeting.host,
                    master_port=meeting.port,
                    rank_offset=1 + i * self._ranks_per_engine,
                    world_size=meeting.world_size,
                    group_name=meeting.name,
                    backend=meeting.backend,
                    deadline_s=engines.request_s,
                )
                for i, engine in enumerate(engines.clients)
            }
            what = "forming the weight-sync group"
            with self._telling_others():
                await engines.together(what, {stage.who: stage.form(meeting), **joins})

    async def prepare(self, version: PolicyVersion, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Make the first bucket."""
        self._local.begin(tensors)
        self._first = await self._local.next()

    async def deliver(self, version: PolicyVersion, engines: Engines) -> int:
        """Send all buckets.

        Raises:
            WeightSyncError: names the bucket, and who failed or is late.
        """
        with self._telling_others():
            num_bytes = await self._deliver(version, engines)
            ends = {stage.who: stage.end() for stage in self._others}
            await engines.together("ending the push", ends)
        return num_bytes

    async def _deliver(self, version: PolicyVersion, engines: Engines) -> int:
        bucket, self._first = self._first, None
        num_bytes = index = at = 0
        before: dict[str, asyncio.Task[None]] = {}
        while bucket is not None:
            what = f"bucket {index} (from {bucket.names[0]})"
            is_last = bucket.is_last and at == len(self._stages) - 1
            receives = self._receives(bucket, at, version if is_last else None, engines)
            # The requests are on their way before this thread's interpreter is shared.
            sent = asyncio.ensure_future(self._stages[at].send())
            await asyncio.sleep(0)
            upcoming = asyncio.ensure_future(self._following(at))
            waits: dict[str, Awaitable[Any]] = {
                self._stages[at].who: sent,
                "the trainer's export": upcoming,
                **before,
            }
            with span("bucket", bytes=bucket.num_bytes):
                await engines.together(what, waits, receives.items())
            num_bytes += bucket.num_bytes
            before, index = receives, index + 1
            at, bucket = upcoming.result()
        await engines.together(f"bucket {index - 1}, the last one", before)
        return num_bytes

    async def abandon(self, engines: Engines) -> None:
        """Leave the groups, and see the export to its end, on all senders."""
        self._first = None
        for stage in self._others:
            stage.tell_abandoned("engines could not be reached")  # unless it knows more
        await self._local.abandon()
        waits = {stage.who: stage.abandon() for stage in self._others}
        await engines.together("ending a failed push", waits)

    def follow(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """See `Transport.follow`."""
        self._follow(tensors)

    async def close(self) -> None:
        """End the exporting thread once it is idle."""
        self._local.close()

    async def _following(self, at: int) -> tuple[int, Bucket | None]:
        """The next bucket and the number of the stage that sends it."""
        while at < len(self._stages):
            if (bucket := await self._stages[at].next()) is not None:
                return at, bucket
            at += 1
        return at, None

    @contextmanager
    def _telling_others(self) -> Iterator[None]:
        """A failure ends the push on the other senders too."""
        try:
            yield
        except WeightSyncError as error:
            for stage in self._others:
                stage.tell_abandoned(str(error))
            raise

    def _name(self, number: int) -> str:
        return f"{self._group_name}_{number}"

    def _receives(
        self, bucket: Bucket, stage: int, version: PolicyVersion | None, engines: Engines
    ) -> dict[str, asyncio.Task[None]]:
        """Ask every engine to receive; SGLang takes such requests one after another."""
        return {
            engine.url: asyncio.ensure_future(
                timed(
                    number,
                    engine.update_weights_from_distributed(
                        names=bucket.names,
                        dtypes=bucket.dtypes,
                        shapes=bucket.shapes,
                        group_name=self._name(stage),
                        # An engine takes the version with the bucket: the last one carries it.
                        weight_version=None if version is None else str(version),
                        load_format="flattened_bucket" if bucket.is_flat else None,
                        flush_cache=version is not None and self._flush_cache,
                        # It can wait for the bucket before.
                        deadline_s=2 * engines.request_s,
                    ),
                )
            )
            for number, engine in enumerate(engines.clients)
        }


async def timed(index: int, wait: Awaitable[None]) -> None:
    """`wait`, with a span that names the engine: `obs.why` looks for slow ones."""
    with span(RECEIVE, engine=index):
        await wait
