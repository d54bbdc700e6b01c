"""Functions that save and restore on gloo ranks, in good order and with everything that fails."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_matpo import checkpoint_files
from megatron_matpo.config import Config
from megatron_matpo.errors import CheckpointError, DeadlineError
from megatron_matpo.megatron import checkpoint_writer
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.batch import MicroBatch
from tests.helpers.dist import RankInfo
from tests.helpers.megatron_ranks import layout, make_actor, share
from tests.helpers.tiny import weighted_loss


def with_checkpoint(config: Config, **settings: Any) -> Config:
    """`config` with other settings of its section `checkpoint`."""
    return replace(config, checkpoint=replace(config.checkpoint, **settings))


def train_and_save(
    info: RankInfo, config: Config, batches: Sequence[MicroBatch], folder: Path, until: int
) -> dict[str, Any]:
    """Resume from `folder` or start; update until `until`, saving after every update."""
    with layout(info, config) as state:
        actor = make_actor(config, state)
        extra = actor.restore(folder)
        first = extra["updates"] if extra else 0
        draws = [float(torch.rand(()))]
        results = []
        for i in range(first, until):
            results.append(actor.update(share(batches, state), weighted_loss, i))
            actor.save(folder, i + 1, {"updates": i + 1})
            draws.append(float(torch.rand(())))
        actor.finish_save()
        return {
            "extra": extra,
            "results": results,
            "draws": draws,
            "weights": dict(actor.export()),
        }


def restore_and_save(
    info: RankInfo, config: Config, batches: Sequence[MicroBatch], folder: Path, to: Path
) -> dict[str, Any]:
    """Restore from `folder`, write the same state to `to`, then score and make one update."""
    with layout(info, config) as state:
        actor = make_actor(config, state)
        extra = actor.restore(folder)
        assert extra is not None
        actor.save(to, extra["updates"], extra)
        actor.finish_save()
        result = actor.update(share(batches, state), weighted_loss, extra["updates"])
        return {"result": result, "weights": dict(actor.export())}


def restore_error(info: RankInfo, config: Config, folder: Path) -> str:
    """The error that restoring from `folder` gives on this rank."""
    with layout(info, config) as state:
        try:
            make_actor(config, state).restore(folder)
        except CheckpointError as error:
            return str(error)
        return ""


def restored_extra(info: RankInfo, config: Config, folder: Path) -> Any:
    """What restoring from `folder` returns."""
    with layout(info, config) as state:
        return make_actor(config, state).restore(folder)


@contextlib.contextmanager
def held_back(action: Callable[[], None]) -> Iterator[None]:
    """Inside the block, `action` runs in this rank's writer thread before it writes its file."""
    original = checkpoint_writer.FileSystemWriter.write_data

    def write_data(*args: Any, **options: Any) -> Any:
        action()
        return original(*args, **options)

    checkpoint_writer.FileSystemWriter.write_data = write_data
    try:
        yield
    finally:
        checkpoint_writer.FileSystemWriter.write_data = original


def change_while_writing(
    info: RankInfo, config: Config, batches: Sequence[MicroBatch], folder: Path
) -> dict[str, Any]:
    """Save step 1 twice: at once, and while updates go on before any file is written."""
    with layout(info, config) as state:
        actor = make_actor(config, state)
        mine = share(batches, state)
        actor.update(mine, weighted_loss, 0)
        actor.save(folder / "at_once", 1, {"updates": 1})
        actor.finish_save()
        goes_on = threading.Event()
        with held_back(lambda: _wait(goes_on)):
            # Only rank 0's further files are kept.
            further = {"in_flight.rollout": f"groups of rank {state.rank}".encode()}
            actor.save(folder / "meanwhile", 1, {"updates": 1}, further)
            for i in range(1, 4):
                actor.update(mine, weighted_loss, i)
                torch.rand(())
                actor.poll_save()
            is_early = (folder / "meanwhile" / "latest").exists()
            goes_on.set()
            actor.finish_save()
        return {"is_early": is_early}


def _wait(event: threading.Event) -> None:
    assert event.wait(60)


def late_writer(info: RankInfo, config: Config, folder: Path) -> str:
    """The error of a save whose file is not written on rank 1 before the deadline."""
    goes_on = threading.Event()
    with layout(info, config) as state:
        actor = make_actor(config, state)
        with held_back(lambda: _wait(goes_on) if state.rank == 1 else None):
            actor.save(folder, 1, {})
            try:
                actor.finish_save()
            except DeadlineError as error:
                return str(error)
            finally:
                goes_on.set()
        return ""


def save_then_die(
    info: RankInfo, config: Config, batches: Sequence[MicroBatch], folder: Path, when: str
) -> None:
    """Save step 1, update, and be killed on every rank while saving step 2.

    `when` is "writing" (rank 0's data is on disk, the folder not renamed) or "renamed" (the folder
    is complete, `latest` still names the older one).
    """
    with layout(info, config) as state:
        actor = make_actor(config, state)
        actor.save(folder, 1, {"updates": 1})
        actor.finish_save()
        actor.update(share(batches, state), weighted_loss, 1)
        if when == "writing":
            checkpoint_files.commit = _die
        else:
            checkpoint_files.write_atomic = _die
        actor.save(folder, 2, {"updates": 2})
        actor.finish_save()


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failing_save(
    info: RankInfo, config: Config, batches: Sequence[MicroBatch], folder: Path
) -> dict[str, Any]:
    """Save step 1; then save step 2 with a disk that is full on rank 1, then step 3 without.

    What every rank is told, by the first `poll` after the files' end; and what is left on disk.
    """
    with layout(info, config) as state:
        actor = make_actor(config, state)
        actor.save(folder, 1, {"updates": 1})
        actor.finish_save()
        error_text = ""
        with held_back(lambda: _disk_full() if state.rank == 1 else None):
            actor.save(folder, 2, {"updates": 2})
            try:
                _poll_until_done(actor)
            except CheckpointError as error:
                error_text = str(error)
        left = sorted(path.name for path in folder.iterdir())
        actor.save(folder, 3, {"updates": 3})
        actor.finish_save()
        return {"error": error_text, "left": left}


def _poll_until_done(actor: MegatronActor) -> None:
    """Poll as often as it takes; each poll meets the other ranks, so all make equally many."""
    for _ in range(2000):
        actor.poll_save()
        if actor._checkpoints._writer._pending is None:
            return
        threading.Event().wait(0.01)
    raise AssertionError("the save did not end")


def _disk_full() -> None:
    raise OSError(28, "No space left on device")


def save_to_small_disk(
    info: RankInfo, config: Config, folder: Path, checks_space: bool
) -> dict[str, Any]:
    """Save steps until the file system is full; the error, and the steps that were completed."""
    if not checks_space:
        checkpoint_writer._check_space = lambda *_: None
    with layout(info, config) as state:
        actor = make_actor(config, state)
        for step in range(1, 100):
            try:
                actor.save(folder, step, {"updates": step})
                actor.finish_save()
            except CheckpointError as error:
                return {"error": str(error), "step": step}
        raise AssertionError("the disk did not fill up")


def train_and_score(
    info: RankInfo, config: Config, batches: Sequence[MicroBatch], folder: Path
) -> dict[str, Any]:
    """Two updates, a checkpoint after each; then weights (rank 0) and log-probs (last stage)."""
    with layout(info, config) as state:
        actor = make_actor(config, state)
        for i in range(2):
            actor.update(share(batches, state), weighted_loss, i)
            actor.save(folder, i + 1, {"updates": i + 1})
        actor.finish_save()
        scores = actor.score(share(batches, state))
        return {
            "weights": dict(actor.export()),
            "scores": scores if state.is_last_stage else [],
        }
