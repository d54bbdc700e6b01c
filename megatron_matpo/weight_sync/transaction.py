"""A push as a transaction: prepare -> pause -> deliver -> verify -> resume.

Engines that gave their memory to the trainer (`release`) take room for weights before `deliver`
and their cache before `resume`.

Invariants:

* engines are paused only from `pause` to `resume`; what can be done before is done in `prepare`;
* an engine is resumed with the old version (nothing was sent to any, and it still holds it) or
  with the new one, verified on all; after any other failure all stay paused, and none serves parts
  of two versions;
* every wait has the deadline `weight_sync.timeout_s`; the error names phase, engine and place.

After a failure the object refuses further pushes: the group with the engines may be broken, and the
run resumes from its last checkpoint with new engines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_matpo.errors import EngineTimeout, WeightSyncError
from megatron_matpo.types import PolicyVersion
from megatron_matpo.weight_sync.engines import EngineControl, Engines, PauseMode
from megatron_matpo.weight_sync.memory import EngineMemory
from megatron_matpo.weight_sync.verify import Verifier

Export = Callable[[], Iterator[tuple[str, Tensor]]]


class Transport(Protocol):
    """How the weights come to the engines. Rank 0 calls all but `follow`, the others that alone."""

    async def connect(self, engines: Engines) -> None:
        """Form whatever is needed before the first push."""
        ...

    async def prepare(self, version: PolicyVersion, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """What can be done while the engines still generate."""
        ...

    async def deliver(self, version: PolicyVersion, engines: Engines) -> int:
        """Give paused engines all tensors of `prepare`, the version with the last of them.

        Returns:
            Bytes that each engine got.
        """
        ...

    def follow(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """The part of a push that a rank has to play which does not talk to the engines."""
        ...

    async def close(self) -> None:
        """Release what `connect` and `prepare` took."""
        ...


@dataclass(frozen=True)
class PushReport:
    """What one push took (seconds)."""

    num_bytes: int = 0
    prepare_s: float = 0.0
    deliver_s: float = 0.0
    verify_s: float = 0.0
    pause_s: float = 0.0
    """For so long no engine sampled: from the first request to pause to the last one resumed."""


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
    ) -> None:
        """Keep the arguments; nothing is contacted before `connect`.

        `pause_mode` `in_place` goes with a transport that does not flush the engines' caches.
        """
        self._export = export
        self._engines = Engines(engines, timeout_s)
        self._transport = transport
        self._verifier = verifier
        self._memory = EngineMemory()
        self._start_timeout_s = start_timeout_s
        self._pause_mode: PauseMode = pause_mode
        self._is_connected = False
        self._runner = asyncio.Runner()
        self._phase = ""
        self._failed = ""
        self.report = PushReport()
        """Of the last push."""

    def connect(self) -> None:
        """Wait for the engines, and connect the transport (rank 0; elsewhere nothing).

        The second time there is nothing to do.

        Raises:
            EngineError: an engine does not generate inside `run.start_timeout_s`.
            WeightSyncError: an engine refused, or did not come inside `weight_sync.timeout_s`.
        """
        if self._engines.clients and not self._is_connected:
            self._runner.run(self._connect())
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

        Returns:
            The version that the engines serve from now on.

        Raises:
            WeightSyncError: a phase failed or a deadline passed. The engines serve the version
                before, if nothing was sent yet, and stay paused otherwise.
        """
        if not self._engines.clients:
            self._transport.follow(self._export())
        elif self._failed:
            raise WeightSyncError(f"an earlier push failed: {self._failed}")
        else:
            self._runner.run(self._push(version))
        return version

    def close(self) -> None:
        """Release connections and the event loop. Engines stay as they are."""
        if self._engines.clients:
            self._runner.run(self._close())
        self._runner.close()

    async def _close(self) -> None:
        await self._transport.close()
        for engine in self._engines.clients:
            await engine.close()

    async def _connect(self) -> None:
        try:
            await asyncio.gather(
                *(
                    engine.wait_ready(deadline_s=self._start_timeout_s)
                    for engine in self._engines.clients
                )
            )
        except EngineTimeout as error:
            raise EngineTimeout(f"{error} (run.start_timeout_s)") from error
        await self._transport.connect(self._engines)

    async def _release(self) -> None:
        try:
            await self._memory.release(self._engines)
        except WeightSyncError as error:
            self._failed = f"handing the engines' memory to the trainer: {error}"
            now = await self._engines.describe()
            raise WeightSyncError(f"{self._failed}. The engines stay paused. Now: {now}") from error

    async def _push(self, version: PolicyVersion) -> None:
        self._phase = "prepare"
        try:
            await self._transact(version)
        except WeightSyncError as error:
            self._failed = f"weights of version {version}, phase {self._phase!r}: {error}"
            left = await self._after_failure()
            raise WeightSyncError(f"{self._failed}. {left}") from error

    async def _transact(self, version: PolicyVersion) -> None:
        engines = self._engines
        started = time.monotonic()
        await self._transport.prepare(version, self._verifier.watch(version, self._export()))
        self._phase, paused = "pause", time.monotonic()
        mode: PauseMode = self._pause_mode
        await engines.all("pausing", lambda e: e.pause(mode=mode, deadline_s=engines.request_s))
        self._phase = "take weights"
        await self._memory.take_weights(engines)
        self._phase, delivering = "deliver", time.monotonic()
        num_bytes = await self._transport.deliver(version, engines)
        self._phase, verifying = "verify", time.monotonic()
        await self._verifier.check(version, engines)
        self._phase, verified = "take cache", time.monotonic()
        await self._memory.take_cache(engines)
        self._phase = "resume"
        await engines.all("resuming", lambda e: e.resume(deadline_s=engines.request_s))
        self.report = PushReport(
            num_bytes=num_bytes,
            prepare_s=paused - started,
            deliver_s=verifying - delivering,
            verify_s=verified - verifying,
            pause_s=time.monotonic() - paused,
        )

    async def _after_failure(self) -> str:
        """Leave the engines in a state that can be named; what that is."""
        if not self._memory.has_weights:
            left = "The engines hold no weights, stay paused and serve nothing"
        elif self._phase in ("prepare", "pause"):
            # Nothing was sent, so every engine may serve on. One that cannot be told so stays
            # paused, which is safe too.
            brief = _in_brief(self._engines)
            try:
                await brief.all("resuming", lambda e: e.resume(deadline_s=brief.request_s))
                left = "No engine got anything: they serve the version before"
            except WeightSyncError as error:
                left = f"No engine got anything; not all could be resumed ({error})"
        elif self._phase in ("take cache", "resume"):
            left = "Every engine holds the new weights, verified; some may be paused still"
        else:
            left = "The engines stay paused and serve nothing: they may hold parts of two versions"
        return f"{left}. Now: {await self._engines.describe()}"


def _in_brief(engines: Engines) -> Engines:
    """The same engines with a deadline that fits the end of a run."""
    return Engines(engines.clients, min(engines.timeout_s, 5.0))


class PushOnce:
    """The control experiment `weight_sync.transport=none`: engines keep the run's first weights."""

    def __init__(self, sync: Transaction) -> None:
        """Wrap `sync`, whose first push is let through."""
        self._sync = sync
        self._served: PolicyVersion | None = None

    def connect(self) -> None:
        """As `Transaction.connect`."""
        self._sync.connect()

    def push(self, version: PolicyVersion) -> PolicyVersion:
        """Push the first time; afterwards only say which version is served."""
        if self._served is None:
            self._served = self._sync.push(version)
        return self._served

    def close(self) -> None:
        """As `Transaction.close`."""
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
