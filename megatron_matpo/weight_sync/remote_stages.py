"""Rank 0 and the senders of later pipeline stages: who does what, over a group of the senders.

Rank 0 asks one question at a time (`RemoteStage`), the other sender does it and answers
(`StageFollower`). A push ends with rank 0's word on both sides: `end`, or `abandon`, which may come
while a question is open and is answered itself, behind whatever was still to be answered. So
nothing of a failed push is left on the way, and the next attempt can begin.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_matpo.errors import WeightSyncError
from megatron_matpo.weight_sync.buckets import Bucket
from megatron_matpo.weight_sync.engines import SLACK_S
from megatron_matpo.weight_sync.stages import LocalStage, Meeting, in_daemon_thread
from megatron_matpo.weight_sync.verify import Verifier

T = TypeVar("T")


class Channel:
    """JSON between two senders over a gloo group; every wait ends with the group's timeout.

    A failed wait is a RuntimeError: the peer is gone.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int) -> None:
        """`peer` is a rank of the whole trainer."""
        self._group, self._peer = group, peer
        self._sent = threading.Event()
        self._sent.set()

    def send(self, message: dict[str, Any]) -> asyncio.Future[None]:
        """Done when the peer takes it; goes on if nobody waits. Messages keep their order."""
        before, done = self._sent, threading.Event()
        self._sent = done

        def send() -> None:
            before.wait()
            try:
                self._send(message)
            finally:
                done.set()

        return in_daemon_thread(send)

    def receive(self) -> asyncio.Future[dict[str, Any]]:
        """The next message; one wait at a time."""
        return in_daemon_thread(self._receive)

    def _send(self, message: dict[str, Any]) -> None:
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        dist.send(torch.tensor([data.numel()]), self._peer, group=self._group)
        dist.send(data, self._peer, group=self._group)

    def _receive(self) -> dict[str, Any]:
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
        self._reading: asyncio.Future[dict[str, Any]] | None = None
        """Goes on when its question is given up."""
        self._is_told = False

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

    async def end(self) -> None:
        """The rank has done its part of this push."""
        await self._tell({"do": "end"})

    def tell_abandoned(self, why: str) -> None:
        """Tell the rank that the push failed, without waiting for it."""
        if not self._is_told:
            self._is_told = True
            # A rank that is gone need not know.
            take_error(self._channel.send({"do": "abandon", "why": why}))

    async def abandon(self) -> None:
        """After `tell_abandoned`: return when the rank is ready for another attempt."""
        while "abandoned" not in await self._read():
            pass
        self._is_told = False

    async def _ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        async with self._one_at_a_time:
            await self._tell({"do": verb, **arguments})
            answer = await self._read()
        if "error" in answer:
            # Who sends is in the name of a wait for that; which stage is next is not.
            who = f"{self.who}: " if verb == "next" else ""
            raise WeightSyncError(f"{who}{answer['error']}")
        return answer

    async def _tell(self, message: dict[str, Any]) -> None:
        try:
            await self._channel.send(message)
        except RuntimeError as error:
            raise WeightSyncError(f"{self.who} is gone: {error}") from error

    async def _read(self) -> dict[str, Any]:
        if self._reading is None:
            self._reading = take_error(self._channel.receive())
        try:
            answer = await asyncio.shield(self._reading)
        except RuntimeError as error:
            raise WeightSyncError(f"{self.who} is gone: {error}") from error
        self._reading = None
        return answer


class StageFollower:
    """The part of a later stage's sender in a push: `BroadcastTransport.follow` of that rank."""

    def __init__(
        self, stage: LocalStage, group: dist.ProcessGroup, verifier: Verifier, timeout_s: float
    ) -> None:
        """`group` is that of all senders, whose rank 0 leads; `timeout_s` bounds every verb."""
        self._stage, self._channel = stage, Channel(group, 0)
        self._verifier, self._timeout_s = verifier, timeout_s
        self._ahead: asyncio.Future[Bucket | None]

    def __call__(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Do what rank 0 asks until it says that the push is over.

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
        self._look_ahead()
        who, failure = self._stage.who, ""
        heard = self._channel.receive()
        while True:
            try:
                request = await heard
            except RuntimeError as error:
                what = failure or f"no word from trainer rank 0: {error}"
                raise WeightSyncError(f"{who}: {what}") from error
            if request["do"] == "end":
                return
            if request["do"] == "abandon":
                take_error(self._channel.send({"abandoned": True}))
                what = failure or f"the push failed elsewhere: {request['why']}"
                raise WeightSyncError(f"{who}: {what}")
            # What a verb waits for can be an engine that rank 0 knows to be gone.
            heard = self._channel.receive()
            answer = await self._answer(request, heard)
            failure = failure or answer.get("error", "")
            take_error(self._channel.send(answer))

    async def _answer(
        self, request: dict[str, Any], heard: asyncio.Future[dict[str, Any]]
    ) -> dict[str, Any]:
        """What came of a verb; it is broken off when something else is heard."""
        verb = request["do"]
        doing = asyncio.ensure_future(self._do(request))
        # Rank 0 knows more of a late one, so its deadline is the first to pass.
        limit_s = self._timeout_s + SLACK_S
        await asyncio.wait({doing, heard}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        doing.cancel()  # nothing, if it is done
        try:
            return await doing
        except (Exception, asyncio.CancelledError) as error:
            if heard.done():
                return {}
            late = f"not done after {self._timeout_s:g} s (weight_sync.timeout_s)"
            return {"error": f"{verb}: {str(error) or late}"}

    async def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        verb = request.pop("do")
        if verb == "form":
            await self._stage.form(Meeting(**request))
            return {}
        if verb == "send":
            await self._stage.send()
            return {}
        assert verb == "next", verb
        if (bucket := await self._ahead) is None:
            return {"bucket": None, "expected": self._verifier.expected}
        self._look_ahead()
        fields = asdict(replace(bucket, parts=()))
        del fields["parts"]
        return {"bucket": fields}

    def _look_ahead(self) -> None:
        """Always one ahead of what rank 0 asks for, as rank 0's own export is."""
        self._ahead = take_error(asyncio.ensure_future(self._stage.next()))


def take_error(future: asyncio.Future[T]) -> asyncio.Future[T]:
    """Nobody may wait for it: its error is not to be logged then."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
