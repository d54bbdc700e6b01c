"""A push as a transaction: connect -> prepare -> pause -> deliver -> verify -> resume.

Engines that gave their memory to the trainer (`release`) take room for weights before `deliver`
and their cache before `resume`.

Invariants:

* engines are paused only from `pause` to `resume` (and from `release` on, if they gave their memory
  to the trainer); what can be done before is done in `prepare`;
* an engine is resumed with the new version, verified, or with the old one (nothing was sent to
  any, and it still holds it); none serves parts of two versions;
* every wait has a deadline; the error names phase, engine and place.

An engine that fails is reported as lost, and the push is made again with those that still answer
(`weight_sync.retries`), in a group of their own. When that is used up the object refuses further
pushes, and the run resumes from its last checkpoint with new engines. Who takes part is rank 0's
word (`Membership`); all ranks make the export together, so that word is shared before each.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from megatron_matpo.errors import EngineTimeout, WeightSyncError
from megatron_matpo.types import PauseMode, PolicyVersion
from megatron_matpo.weight_sync.engines import EngineControl, Engines
from megatron_matpo.weight_sync.membership import FixedMembership, Member, Recovery, Which
from megatron_matpo.weight_sync.memory import EngineMemory
from megatron_matpo.weight_sync.transport import Export, PushReport, Transport
from megatron_matpo.weight_sync.verify import Verifier

_log = logging.getLogger(__name__)

_NOBODY, _GO, _GO_FIRST, _DONE, _AGAIN = b"nobody", b"go", b"go, first weights", b"done", b"again"
_UNDELIVERED = ("connect", "pause", "take weights", "deliver")
_POLL_S = 0.5


class Transaction:
    """Keeps engines on the trainer's weights; on rank 0 `engines` are clients, elsewhere none."""

    def __init__(
        self,
        export: Export,
        engines: Sequence[EngineControl],
        transport: Transport,
        verifier: Verifier,
        *,
        timeout_s: float,
        start_timeout_s: float,
        pause_mode: PauseMode = "abort",
        recovery: Recovery | None = None,
    ) -> None:
        """Keep the arguments; nothing is contacted before `connect`.

        `pause_mode` `in_place` goes with a transport that does not flush the engines' caches.
        Without `recovery` a push is not tried again, and rank 0 is alone.
        """
        self._export = export
        self._engines = Engines(engines, timeout_s)
        self._transport = transport
        self._verifier = verifier
        self._memory = EngineMemory()
        self._start_timeout_s = start_timeout_s
        self._pause_mode: PauseMode = pause_mode
        self._recovery = recovery or Recovery(FixedMembership(len(engines)))
        self._is_connected = self._has_reached = False
        self._runner = asyncio.Runner()
        self._phase = ""
        self._failed = ""
        self._members: list[Member] = []
        """Who takes part in the present push."""
        self._connected: list[Member] = []
        """Whom the transport reaches, or nobody."""
        self._verified: set[Member] = set()
        """Who has got weights at least once."""
        self.report = PushReport()
        """Of the last push; zeros on ranks without engines."""

    def connect(self) -> None:
        """Wait for the engines (rank 0; elsewhere nothing). The second time nothing is to be done.

        The transport reaches them in the first push, which other ranks take part in.

        Raises:
            EngineError: an engine does not generate inside `run.start_timeout_s`.
        """
        if self._engines.clients and not self._is_connected:
            self._runner.run(self._wait_for_engines())
        self._is_connected = True

    def release(self) -> None:
        """Pause all engines and have them give their memory back; the next push undoes it.

        Rank 0; elsewhere nothing.

        Raises:
            WeightSyncError: an engine refused, or did not answer in time. All stay paused.
        """
        if self._engines.clients:
            self._runner.run(self._release())

    def push(self, version: PolicyVersion) -> PolicyVersion:
        """Send all weights as `version` and verify what every engine holds. All ranks call.

        Engines that cannot take them are left out and reported as lost.

        Returns:
            The version that the engines serve from now on.

        Raises:
            WeightSyncError: a phase failed or a deadline passed, and trying again did not help, or
                no engine is left. The engines serve the version before, if nothing was sent yet,
                and stay paused otherwise.
        """
        self._bring(version, Which.LIVING)
        return version

    def refit(self, version: PolicyVersion) -> None:
        """Give the weights to engines that wait for them; the others serve on. All ranks call.

        The weights are the present ones, and `version` is the one that the others serve.

        Raises:
            WeightSyncError: an engine answers, but cannot take them.
        """
        self._bring(version, Which.WAITING)

    def _bring(self, version: PolicyVersion, which: Which) -> None:
        is_first_rank = bool(self._engines.clients)
        agree, num_attempts = self._recovery.agree, 1 + self._recovery.retries
        if self._failed:
            raise WeightSyncError(f"an earlier push failed: {self._failed}")
        for attempt in range(1, num_attempts + 1):
            word = self._runner.run(self._gather(which)) if is_first_rank else None
            begun = agree(word)
            if begun == _NOBODY:
                return
            if begun == _GO_FIRST:
                self._verifier.compare_all()
            is_last = attempt == num_attempts
            if is_first_rank:
                word = self._runner.run(self._push(version, is_last=is_last))
            else:
                self._follow(is_last=is_last)
            if agree(word) == _DONE:
                return
        raise AssertionError("rank 0 raises when the last attempt fails")

    def _follow(self, *, is_last: bool) -> None:
        """The part of a rank that does not talk to the engines; whether it helped rank 0 says."""
        try:
            self._transport.follow(self._export())
        except WeightSyncError as error:
            if is_last:
                raise
            _log.warning("%s", error)

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last push; nothing on ranks without engines."""
        return self.report.metrics if self.report.num_bytes else {}

    def close(self) -> None:
        """Release connections and the event loop. Engines stay as they are."""
        if self._engines.clients:
            self._runner.run(self._close())
        self._runner.close()

    async def _close(self) -> None:
        await self._transport.close()
        for engine in self._engines.clients:
            await engine.close()

    async def _wait_for_engines(self) -> None:
        try:
            await asyncio.gather(
                *(
                    engine.wait_ready(deadline_s=self._start_timeout_s)
                    for engine in self._engines.clients
                )
            )
        except EngineTimeout as error:
            raise EngineTimeout(f"{error} (run.start_timeout_s)") from error

    async def _release(self) -> None:
        membership = self._recovery.membership
        try:
            # Nobody may think that a paused engine is dead.
            await membership.refit_began(range(len(self._engines.clients)))
            await self._memory.release(self._engines)
        except WeightSyncError as error:
            self._failed = f"handing the engines' memory to the trainer: {error}"
            now = await self._engines.describe()
            raise WeightSyncError(f"{self._failed}. The engines stay paused. Now: {now}") from error

    async def _gather(self, which: Which) -> bytes:
        """Wait until an engine can take part.

        Raises:
            WeightSyncError: none inside `run.start_timeout_s`.
        """
        membership = self._recovery.membership
        # At the start the manager may not have heard of what this rank has waited for.
        which = which if self._verified else Which.ALL
        end = time.monotonic() + self._start_timeout_s
        while not (members := await membership.members(which)):
            if which is Which.WAITING:
                return _NOBODY
            if time.monotonic() > end:
                raise WeightSyncError(
                    f"no engine to give weights to inside run.start_timeout_s="
                    f"{self._start_timeout_s:g}: {await membership.describe()}"
                )
            await asyncio.sleep(_POLL_S)
        self._members = members
        return _GO if self._verified.issuperset(members) else _GO_FIRST

    async def _push(self, version: PolicyVersion, *, is_last: bool) -> bytes:
        engines = Engines(
            [self._engines.clients[member.index] for member in self._members],
            self._engines.timeout_s,
            [member.index for member in self._members],
        )
        try:
            await self._reach(engines)
            await self._transact(version, engines)
            return _DONE
        except WeightSyncError as error:
            what = f"weights of version {version}, phase {self._phase!r}: {error}"
            # In `prepare` no engine has a part: the export or the disk would fail again.
            if not is_last and self._phase != "prepare":
                await self._let_go(engines, what)
                return _AGAIN
            self._failed = what
            left = await self._after_failure(engines)
            raise WeightSyncError(f"{self._failed}. {left}") from error

    async def _let_go(self, engines: Engines, what: str) -> None:
        """After a failure that is told by `what`: make another attempt possible, without the lost.

        Raises:
            WeightSyncError: another rank of the trainer does not end its part.
        """
        self._connected = []
        if self._phase in _UNDELIVERED:
            try:
                await self._transport.abandon(engines)
            except WeightSyncError as error:
                raise WeightSyncError(f"{what}. Then {error}") from error
        if self._phase == "connect":
            # The other ranks are in the export, whose collectives need this one.
            for _ in self._export():
                pass
        lost = await engines.silent(self._recovery.answer_timeout_s)
        _log.warning("%s. Lost engines: %s. Trying again", what, lost or "none")
        await self._recovery.membership.lost(lost)

    async def _reach(self, engines: Engines) -> None:
        """Connect the transport to `engines`, unless that is how it is.

        Raises:
            WeightSyncError: one does not answer, or cannot be connected.
        """
        self._phase = "connect"
        if self._members == self._connected:
            return
        # Who is asked to join a group with one that does not come is stuck in there. At the start
        # this rank has just waited for all.
        has_reached, self._has_reached = self._has_reached, True
        if has_reached and (silent := await engines.silent(self._recovery.answer_timeout_s)):
            raise WeightSyncError(f"engines that do not answer: {silent}")
        self._connected = []
        await self._transport.connect(engines)
        self._connected = self._members

    async def _transact(self, version: PolicyVersion, engines: Engines) -> None:
        membership = self._recovery.membership
        self._phase, started = "prepare", time.monotonic()
        await self._transport.prepare(version, self._verifier.watch(self._export()))
        self._phase, paused = "pause", time.monotonic()
        await membership.refit_began(engines.indices)
        mode: PauseMode = self._pause_mode
        await engines.all("pausing", lambda e: e.pause(mode=mode, deadline_s=engines.request_s))
        self._phase = "take weights"
        await self._memory.take_weights(engines)
        self._phase, delivering = "deliver", time.monotonic()
        num_bytes = await self._transport.deliver(version, engines)
        self._phase, verifying = "verify", time.monotonic()
        await self._verifier.check(version, engines)
        self._verified.update(self._members)
        self._phase, verified = "take cache", time.monotonic()
        await self._memory.take_cache(engines)
        self._phase = "resume"
        # The manager knows the version before its first token comes.
        await membership.refitted(version, engines.indices)
        await self._resume(engines)
        self.report = PushReport(
            num_bytes=num_bytes,
            prepare_s=paused - started,
            deliver_s=verifying - delivering,
            verify_s=verified - verifying,
            pause_s=time.monotonic() - paused,
        )

    async def _resume(self, engines: Engines) -> None:
        """Resume what can be resumed: all of them hold the new weights, verified."""
        try:
            await engines.all("resuming", lambda e: e.resume(deadline_s=engines.request_s))
        except WeightSyncError:
            lost = await engines.unwilling(
                lambda e: e.resume(deadline_s=engines.request_s), self._recovery.answer_timeout_s
            )
            if len(lost) == len(engines.clients) or not self._recovery.retries:
                raise
            await self._recovery.membership.lost(lost)

    async def _after_failure(self, engines: Engines) -> str:
        """Leave the engines in a state that can be named; what that is."""
        if not self._memory.has_weights:
            left = "The engines hold no weights, stay paused and serve nothing"
        elif self._phase in ("connect", "prepare", "pause"):
            # Nothing was sent, so every engine may serve on. One that cannot be told so stays
            # paused, which is safe too.
            brief = _in_brief(engines)
            try:
                await brief.all("resuming", lambda e: e.resume(deadline_s=brief.request_s))
                left = "No engine got anything: they serve the version before"
            except WeightSyncError as error:
                left = f"No engine got anything; not all could be resumed ({error})"
        elif self._phase in ("take cache", "resume"):
            left = "Every engine holds the new weights, verified; some may be paused still"
        else:
            left = "The engines stay paused and serve nothing: they may hold parts of two versions"
        return f"{left}. Now: {await engines.describe()}"


def _in_brief(engines: Engines) -> Engines:
    """The same engines with a deadline that fits the end of a run."""
    return Engines(engines.clients, min(engines.timeout_s, 5.0))
