"""Who sends: the first rank of every pipeline stage, through a group of its own with all engines.

So no stage's tensors pass through another rank. Rank 0 talks to the engines and says who is next
(`RemoteStage`), the others do as they are told (`StageFollower`) over a group of the senders
(`Channel`).
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_matpo.errors import WeightSyncError
from megatron_matpo.weight_sync.buckets import Bucket, make_buckets
from megatron_matpo.weight_sync.engines import BLAME_S, SLACK_S
from megatron_matpo.weight_sync.group import form_group, leave_group, open_store
from megatron_matpo.weight_sync.verify import Verifier

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


class Channel:
    """JSON between two senders over a gloo group; every wait ends with the group's timeout."""

    def __init__(self, group: dist.ProcessGroup, peer: int) -> None:
        """`peer` is a rank of the whole trainer."""
        self._group, self._peer = group, peer

    def send(self, message: dict[str, Any]) -> None:
        """Blocks until it is under way."""
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        dist.send(torch.tensor([data.numel()]), self._peer, group=self._group)
        dist.send(data, self._peer, group=self._group)

    def tell(self, message: dict[str, Any]) -> asyncio.Future[None]:
        """Send it, from a thread; a peer that is gone need not know."""

        def send() -> None:
            with suppress(RuntimeError):
                self.send(message)

        return in_daemon_thread(send)

    def receive(self) -> dict[str, Any]:
        """Blocks until one came."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, self._peer, group=self._group)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, self._peer, group=self._group)
        return json.loads(data.numpy().tobytes())


class RemoteStage:
    """Another rank as a sender; it has a `StageFollower`."""

    def __init__(self, rank: int, group: dist.ProcessGroup, verifier: Verifier) -> None:
        """`verifier` gets the checksums that the rank computes of what it sends."""
        self.who = f"trainer rank {rank}"
        self._channel, self._verifier = Channel(group, rank), verifier
        self._one_at_a_time = asyncio.Lock()

    async def form(self, meeting: Meeting) -> None:
        """See `Stage.form`."""
        await self._ask("form", **asdict(meeting))

    async def next(self) -> Bucket | None:
        """See `Stage.next`."""
        answer = await self._ask("next")
        if answer["bucket"] is None:
            self._verifier.expect(answer["expected"])
            return None
        return Bucket(**answer["bucket"], parts=())

    async def send(self) -> None:
        """See `Stage.send`."""
        await self._ask("send")

    def abandon(self, why: str) -> None:
        """Tell the rank that the push failed, without waiting for it."""
        self._channel.tell({"do": "abandon", "why": why})

    async def _ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        def exchange() -> dict[str, Any]:
            self._channel.send({"do": verb, **arguments})
            return self._channel.receive()

        async with self._one_at_a_time:
            try:
                answer = await in_daemon_thread(exchange)
            except RuntimeError as error:
                raise WeightSyncError(f"{self.who} is gone: {error}") from error
        if "error" in answer:
            # Who sends is in the name of a wait for that; which stage is next is not.
            who = f"{self.who}: " if verb == "next" else ""
            raise WeightSyncError(f"{who}{answer['error']}")
        return answer


class StageFollower:
    """The part of a later stage's sender in a push: `BroadcastTransport.follow` of that rank."""

    def __init__(
        self, stage: LocalStage, group: dist.ProcessGroup, verifier: Verifier, timeout_s: float
    ) -> None:
        """`group` is that of all senders, whose rank 0 leads; `timeout_s` bounds every verb."""
        self._stage, self._channel = stage, Channel(group, 0)
        self._verifier, self._timeout_s = verifier, timeout_s

    def __call__(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Do what rank 0 asks until all tensors are sent.

        Raises:
            WeightSyncError: a verb failed or took too long, the push failed elsewhere, or rank 0
                is gone. The export has ended then.
        """
        asyncio.run(self._serve_or_end(tensors))

    async def _serve_or_end(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        try:
            await self._serve(tensors)
        except WeightSyncError:
            # Its collectives are those of other ranks, too.
            await self._stage.abandon()
            raise

    async def _serve(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self._stage.begin(self._verifier.watch(tensors))
        # Always one ahead of what rank 0 asks for, as rank 0's own export is.
        ahead = asyncio.ensure_future(self._stage.next())
        heard = self._hear()
        while True:
            request = await heard
            verb = request.pop("do")
            if verb == "next":
                doing = asyncio.ensure_future(self._described(ahead))
            elif verb == "send":
                doing = asyncio.ensure_future(self._stage.send())
                # It waits for engines, which rank 0 may know to be gone; and it is never the last.
                heard = self._hear()
            else:
                assert verb == "form", verb
                doing = asyncio.ensure_future(self._stage.form(Meeting(**request)))
            answer = await self._result(verb, doing, heard)
            await in_daemon_thread(lambda answer=answer: self._channel.send(answer))
            if verb == "next":
                if answer["bucket"] is None:
                    return
                ahead = asyncio.ensure_future(self._stage.next())
            if verb != "send":
                heard = self._hear()

    async def _described(self, ahead: asyncio.Future[Bucket | None]) -> dict[str, Any]:
        if (bucket := await ahead) is None:
            return {"bucket": None, "expected": self._verifier.expected}
        fields = asdict(replace(bucket, parts=()))
        del fields["parts"]
        return {"bucket": fields}

    async def _result(
        self,
        verb: str,
        doing: asyncio.Future[Any],
        heard: asyncio.Future[dict[str, Any]],
    ) -> dict[str, Any]:
        # Rank 0 knows more of a late one, so its deadline is the first to pass.
        waits: set[asyncio.Future[Any]] = {doing} if heard.done() else {doing, heard}
        limit_s = self._timeout_s + SLACK_S
        await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            doing.cancel()
            if heard in waits and heard.done():
                heard.result()
        try:
            return await doing or {}
        except (Exception, asyncio.CancelledError) as error:
            late = f"not done after {self._timeout_s:g} s (weight_sync.timeout_s)"
            text = f"{verb}: {str(error) or late}"
            # This process may end with the error, and its connections with it.
            await asyncio.wait([self._channel.tell({"error": text})], timeout=BLAME_S)
            raise WeightSyncError(f"{self._stage.who}: {text}") from error

    def _hear(self) -> asyncio.Future[dict[str, Any]]:
        """What rank 0 says next; its saying that the push failed is an error."""

        async def hear() -> dict[str, Any]:
            who = self._stage.who
            try:
                request = await in_daemon_thread(self._channel.receive)
            except RuntimeError as error:
                raise WeightSyncError(f"{who}: no word from trainer rank 0: {error}") from error
            if request["do"] == "abandon":
                raise WeightSyncError(f"{who}: the push failed elsewhere: {request['why']}")
            return request

        return asyncio.ensure_future(hear())


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
