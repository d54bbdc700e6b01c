"""Who holds the devices: trainer and engines on their own, or on the same ones in turns.

    collect -> to_train -> score, learn -> to_rollout -> push -> evaluate, save, collect

| state    | trainer's device memory               | engines                                    |
|----------|---------------------------------------|--------------------------------------------|
| rollout  | weights                               | serve, with weights and KV cache           |
| training | weights, gradients, optimizer, work   | paused, with neither                       |
| push     | weights, two buckets                  | paused, with weights; the cache comes last |

The run begins in `training`: engines start first, then give their memory back, then the trainer
builds its model. It ends in `rollout`. In both states a checkpoint can be written. Every handover
is confirmed on every rank before the other side starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from megatron_matpo.trainer.clock import Clock
from megatron_matpo.trainer.device_memory import DeviceMemory

_LEAST_BYTES = 512 << 20
"""An engine's weights and cache are more than this on any GPU worth having."""


class Placement(Protocol):
    """All ranks call both."""

    def to_train(self) -> None:
        """After a step's episodes are there: the trainer's state is on its devices."""
        ...

    def to_rollout(self) -> None:
        """Before a push: there is room for the engines."""
        ...


class Apart:
    """Devices of their own: nothing to hand over."""

    def to_train(self) -> None:
        """Nothing to do."""

    def to_rollout(self) -> None:
        """Nothing to do."""


class Parked(Protocol):
    """What the trainer can move off its device (`MegatronActor`)."""

    def park(self) -> int:
        """Returns bytes that the device has more."""
        ...

    def unpark(self) -> None:
        """Bring them back."""
        ...


class Released(Protocol):
    """Engines that give their memory back until the next push (`Transaction`)."""

    def release(self) -> None:
        """Rank 0 asks them; elsewhere nothing."""
        ...


class InTurns:
    """The same devices in turns."""

    def __init__(
        self,
        engines: Released,
        meet: Callable[[], None],
        memory: DeviceMemory,
        clock: Clock,
        *,
        has_engine: bool,
    ) -> None:
        """Keep the arguments.

        `meet` returns when all ranks have called it; `has_engine` tells whether an engine is on
        this rank's device.
        """
        self._engines, self._meet = engines, meet
        self._memory, self._clock = memory, clock
        self._least_bytes = _LEAST_BYTES if has_engine else 0
        self._trainer: Parked | None = None
        self._engine_bytes = 0
        """What the engines gave back of this rank's device the last time."""
        self._trainer_bytes = 0
        """The same of the trainer."""

    def start(self) -> None:
        """Before the model is built, with engines that serve: they give their memory back.

        Raises:
            WeightSyncError: an engine refused, or did not answer in time.
            HandoverError: it answered, but the memory is not free.
        """
        self._release(0, "the trainer")

    def own(self, trainer: Parked) -> None:
        """The model is built, and on its device with all it has."""
        self._trainer = trainer

    def to_train(self) -> None:
        """As `Placement.to_train`.

        Raises:
            WeightSyncError: an engine refused, or did not answer in time.
            HandoverError: it answered, but the memory is not free.
        """
        assert self._trainer is not None, "own() comes before"
        with self._clock.phase("switch"):
            self._release(self._trainer_bytes, "the trainer's gradients, optimizer and work")
            self._trainer.unpark()

    def to_rollout(self) -> None:
        """As `Placement.to_rollout`.

        Raises:
            HandoverError: what the engines gave back is not free for them.
        """
        assert self._trainer is not None, "own() comes before"
        with self._clock.phase("switch"):
            self._trainer_bytes = self._trainer.park()
            self._memory.wait_free(self._engine_bytes, "the engine's weights and KV cache")
            # Rank 0 goes on to the push, which begins with the engines' taking their memory.
            self._meet()

    def _release(self, needed: int, what: str) -> None:
        self._meet()
        before = self._memory.free_bytes()
        self._meet()
        self._engines.release()
        self._meet()
        free = self._memory.wait_free(max(needed, before + self._least_bytes), what)
        self._engine_bytes = free - before
