"""Where a step's episodes come from: the rollout manager, or a recording."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import distributed as dist

from megatron_matpo.checkpoint_files import IN_FLIGHT
from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.errors import DataError
from megatron_matpo.rollout.client import ManagerClient, RefitWanted
from megatron_matpo.trainer.stopping import StopRequested, result_or_stop
from megatron_matpo.types import PolicyVersion, RolloutBatch
from megatron_matpo.wire import decode, recording_path

_STOP = b""
"""What rank 0 shares in place of a batch when the run is asked to end."""
_REFIT = b"refit"
"""And when an engine waits for weights."""


class Rollouts(Protocol):
    """A source of episodes. All ranks call and all get the same batch."""

    def connect(self) -> None:
        """Wait until the source can be asked."""
        ...

    def restore(self, checkpoint: Path | None) -> None:
        """Take over what the folder of the resumed checkpoint has in flight, before any collect."""
        ...

    def in_flight(self, step: int) -> bytes:
        """What a checkpoint after `step` has to hold of episodes, on rank 0; empty: nothing."""
        ...

    def collect(
        self, step: int, version: PolicyVersion, split: str = "train", *, position: int = 0
    ) -> RolloutBatch:
        """Episodes of `step`, sampled with policy `version`.

        `train` asks the questions that follow the first `position` ones.

        Raises:
            StopRequested: on all ranks; the supervisor asked the run to end.
        """
        ...


class ManagerRollouts:
    """Asks the manager from rank 0 and hands its bytes to every rank."""

    def __init__(
        self,
        config: RolloutConfig,
        client: ManagerClient,
        share: Callable[[bytes | None], bytes],
        run_dir: Path,
        *,
        is_first_rank: bool,
        refit: Callable[[PolicyVersion], None],
    ) -> None:
        """`share` broadcasts rank 0's bytes to all ranks (see `share_bytes`).

        A stop is requested in `run_dir`. `refit` gives weights to engines that wait for them; all
        ranks call it.
        """
        self._client, self._step_timeout_s = client, config.step_timeout_s
        self._refit = refit
        self._share, self._run_dir = share, run_dir
        self._is_first_rank = is_first_rank
        self._outlive = config.max_staleness > 0 or config.over_sample > 0
        """Whether groups may be in flight between steps."""

    def connect(self) -> None:
        """Wait until the manager and its tool servers are ready (rank 0; elsewhere nothing).

        Raises:
            DeadlineError: `run.start_timeout_s` passed.
        """
        if self._is_first_rank:
            self._client.wait_ready()

    def restore(self, checkpoint: Path | None) -> None:
        """Give the manager the groups that the checkpoint has in flight (rank 0).

        Raises:
            RolloutError: the manager refuses them, or cannot be reached.
        """
        path = checkpoint / IN_FLIGHT if checkpoint is not None else None
        if self._is_first_rank and path is not None and path.is_file():
            self._client.restore(path.read_bytes())
            self._outlive = True

    def in_flight(self, step: int) -> bytes:
        """Groups that are begun and not trained, as the manager gives them.

        Raises:
            RolloutError, DeadlineError: as `collect`.
        """
        if not self._is_first_rank or not self._outlive:
            return b""
        return self._client.in_flight(step)

    def collect(
        self, step: int, version: PolicyVersion, split: str = "train", *, position: int = 0
    ) -> RolloutBatch:
        """As `Rollouts.collect`.

        Raises:
            RolloutError: the manager reports that the step failed, or cannot be reached.
            WeightSyncError: an engine that was started anew cannot take the weights.
            DeadlineError: `rollout.step_timeout_s` passed.
        """
        end = time.monotonic() + self._step_timeout_s
        while True:
            data = None
            if self._is_first_rank:
                left_s = max(0.1, end - time.monotonic())
                ask = partial(
                    self._client.collect, step, version, split, position=position, limit_s=left_s
                )
                try:
                    data = result_or_stop(ask, self._run_dir) or _STOP
                except RefitWanted:
                    data = _REFIT
            shared = self._share(data)
            if shared == _STOP:
                raise StopRequested
            if shared != _REFIT:
                return decode(shared, f"rollout batch of step {step}")
            # Episodes go on meanwhile, on the engines that have the weights.
            self._refit(version)


class ReplayRollouts:
    """Reads recorded `step_N.rollout` files; every rank reads for itself."""

    def __init__(self, folder: str, is_stop_agreed: Callable[[], bool]) -> None:
        """Keep the folder; a missing step is reported when it is asked for.

        `is_stop_agreed` is called by all ranks (see `trainer.stopping`).
        """
        self._folder, self._is_stop_agreed = Path(folder), is_stop_agreed

    def connect(self) -> None:
        """Nothing to wait for."""

    def restore(self, checkpoint: Path | None) -> None:
        """Nothing runs between steps."""

    def in_flight(self, step: int) -> bytes:
        """Nothing runs between steps."""
        return b""

    def collect(
        self, step: int, version: PolicyVersion, split: str = "train", *, position: int = 0
    ) -> RolloutBatch:
        """The recorded batch of `step`, whatever version sampled it and whatever it asked.

        Raises:
            DataError: no recording of that step.
        """
        if self._is_stop_agreed():
            raise StopRequested
        path = recording_path(self._folder, step)
        if not path.exists():
            raise DataError(
                f"rollout.replay={self._folder}: has no {path.name}; record with "
                "obs.record_rollouts=true or lower run.steps"
            )
        return decode(path.read_bytes(), str(path))


def share_bytes(data: bytes | None, group: dist.ProcessGroup, device: torch.device) -> bytes:
    """Rank 0's bytes on every rank of `group`, which all call; blocks until rank 0 has data."""
    size = torch.tensor([len(data) if data is not None else 0], dtype=torch.long, device=device)
    dist.broadcast(size, src=0, group=group)
    buffer = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    if data:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, src=0, group=group)
    return data if data is not None else buffer.cpu().numpy().tobytes()
