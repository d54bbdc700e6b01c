"""Weights from trainer rank 0 to every engine through a process group, in flat buckets.

All trainer ranks call `connect` and `push`: gathering the shards is collective. Only rank 0 talks
to the engines. Every wait has the deadline `weight_sync.timeout_s`.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from torch import Tensor
from torch import distributed as dist

from megatron_matpo.config.train import WeightSyncConfig
from megatron_matpo.errors import EngineError, EngineTimeout, WeightSyncError
from megatron_matpo.obs.spans import RECEIVE, span
from megatron_matpo.types import PolicyVersion
from megatron_matpo.weight_sync.buckets import Bucket, make_buckets
from megatron_matpo.weight_sync.group import form_group

T = TypeVar("T")
Export = Callable[[], Iterator[tuple[str, Tensor]]]
POLL_S = 0.0005
"""How often a running broadcast is looked at; small against any bucket worth sending."""


class EngineControl(Protocol):
    """What weight sync needs of an engine client."""

    @property
    def url(self) -> str:
        """Names the engine in errors."""
        ...

    async def wait_ready(self, *, deadline_s: float) -> None:
        """Return when the engine generates."""
        ...

    async def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
        deadline_s: float,
    ) -> None:
        """Make the engine join the group."""
        ...

    async def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        weight_version: str | None,
        load_format: str | None,
        flush_cache: bool,
        deadline_s: float,
    ) -> None:
        """Make the engine receive one bucket."""
        ...

    async def weight_version(self, *, deadline_s: float) -> str:
        """The version that the engine says it serves."""
        ...

    async def close(self) -> None:
        """Release the client's connections."""
        ...


class BroadcastSync:
    """Pushes the weights; on rank 0 `engines` is the list of clients, elsewhere it is empty."""

    def __init__(
        self,
        config: WeightSyncConfig,
        export: Export,
        engines: Sequence[EngineControl],
        *,
        ranks_per_engine: int,
        host: str,
        port: int,
        backend: str,
        start_timeout_s: float,
    ) -> None:
        """Keep the arguments; nothing is contacted before `connect`."""
        self._start_timeout_s = start_timeout_s
        self._config = config
        self._export = export
        self._engines = engines
        self._ranks_per_engine = ranks_per_engine
        self._host, self._port, self._backend = host, port, backend
        self._group: dist.ProcessGroup | None = None
        # Unique, so that a second attempt never meets the keys or the group of a failed one.
        self._group_name = f"matpo_weights_{secrets.token_hex(4)}"
        self._runner = asyncio.Runner()

    def connect(self) -> None:
        """Wait for the engines and form the group with all of them (rank 0; elsewhere nothing).

        Raises:
            EngineError: an engine does not generate inside `start_timeout_s`.
            WeightSyncError: an engine refused to join, or did not come inside the deadline.
        """
        if self._engines:
            self._runner.run(self._connect())

    def push(self, version: PolicyVersion) -> PolicyVersion:
        """Send all weights as `version` and check that every engine reports it. All ranks call.

        Returns:
            The version that the engines serve from now on.

        Raises:
            WeightSyncError: a bucket failed, a deadline passed, or an engine reports another
                version. The engines must then not be used until a later push succeeds.
        """
        if not self._engines:
            for _ in self._export():
                pass
        else:
            self._runner.run(self._push(version))
        return version

    def close(self) -> None:
        """Release connections and the event loop."""
        for engine in self._engines:
            self._runner.run(engine.close())
        self._runner.close()

    async def _connect(self) -> None:
        try:
            await asyncio.gather(
                *(engine.wait_ready(deadline_s=self._start_timeout_s) for engine in self._engines)
            )
        except EngineTimeout as error:
            raise EngineTimeout(f"{error} (run.start_timeout_s)") from error
        world_size = 1 + self._ranks_per_engine * len(self._engines)
        joins = [
            engine.init_weights_update_group(
                master_address=self._host,
                master_port=self._port,
                rank_offset=1 + i * self._ranks_per_engine,
                world_size=world_size,
                group_name=self._group_name,
                backend=self._backend,
                deadline_s=self._config.timeout_s,
            )
            for i, engine in enumerate(self._engines)
        ]
        own = _in_daemon_thread(
            lambda: form_group(
                host=self._host,
                port=self._port,
                world_size=world_size,
                backend=self._backend,
                name=self._group_name,
                timeout_s=self._config.timeout_s,
            )
        )
        self._group, *_ = await self._all([own, *joins], "forming the weight-sync group")

    async def _push(self, version: PolicyVersion) -> None:
        for bucket in make_buckets(self._export(), self._config.bucket_mb << 20):
            receives = [
                engine.update_weights_from_distributed(
                    names=bucket.names,
                    dtypes=bucket.dtypes,
                    shapes=bucket.shapes,
                    group_name=self._group_name,
                    # The engine takes the version with the bucket, so only the last one carries it.
                    weight_version=str(version) if bucket.is_last else None,
                    load_format="flattened_bucket",
                    flush_cache=bucket.is_last,
                    deadline_s=self._config.timeout_s,
                )
                for engine in self._engines
            ]
            what = f"pushing weights of version {version} (from {bucket.names[0]})"
            with span("bucket", bytes=bucket.data.nbytes):
                timed = [_timed(index, wait) for index, wait in enumerate(receives)]
                await self._all([self._broadcast(bucket), *timed], what)
        versions = await self._all(
            [engine.weight_version(deadline_s=self._config.timeout_s) for engine in self._engines],
            f"reading back version {version}",
        )
        for engine, reported in zip(self._engines, versions, strict=True):
            if reported != str(version):
                raise WeightSyncError(
                    f"engine {engine.url} reports weight version {reported!r} after version "
                    f"{version} was pushed; its weights cannot be trusted"
                )

    async def _broadcast(self, bucket: Bucket) -> None:
        work = dist.broadcast(bucket.data, src=0, group=self._group, async_op=True)
        assert work is not None, "rank 0 is a member of the group"
        while not work.is_completed():
            await asyncio.sleep(POLL_S)
        work.wait()

    async def _all(self, waits: Iterable[Awaitable[T]], what: str) -> list[T]:
        """Run together; the first failure or the deadline ends the wait."""
        limit, started = self._config.timeout_s, time.monotonic()
        try:
            async with asyncio.timeout(limit):
                return await asyncio.gather(*waits)
        except TimeoutError as error:
            raise WeightSyncError(
                f"{what}: not done after {time.monotonic() - started:.0f} s "
                f"(weight_sync.timeout_s={limit:g})"
            ) from error
        except (EngineError, RuntimeError) as error:
            raise WeightSyncError(f"{what}: {error}") from error


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


class PushOnce:
    """The control experiment `weight_sync.transport=none`: engines keep the run's first weights."""

    def __init__(self, sync: BroadcastSync) -> None:
        """Wrap `sync`, whose first push is let through."""
        self._sync = sync
        self._served: PolicyVersion | None = None

    def connect(self) -> None:
        """As `BroadcastSync.connect`."""
        self._sync.connect()

    def push(self, version: PolicyVersion) -> PolicyVersion:
        """Push the first time; afterwards only say which version is served."""
        if self._served is None:
            self._served = self._sync.push(version)
        return self._served

    def close(self) -> None:
        """As `BroadcastSync.close`."""
        self._sync.close()


class NoEngines:
    """For runs without engines (replay): nothing to keep in step."""

    def connect(self) -> None:
        """Nothing to form."""

    def push(self, version: PolicyVersion) -> PolicyVersion:
        """Nothing is sent."""
        return version

    def close(self) -> None:
        """Nothing to release."""
