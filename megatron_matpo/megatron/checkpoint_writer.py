"""Writes a checkpoint while the training goes on.

    begin   collective   plan, free space, copy to host memory         training is blocked
    write   a thread     this rank's file, hashed on the way, fsync    training goes on
    finish  collective   metadata, manifest, rename, `latest`, prune   training is blocked briefly

A save that is waited for is the same three phases in a row, so both kinds write the same bytes.

Threads, not processes: Megatron's writer (`strategies/async_utils.py`) forks, which is not safe
beside gloo's threads, or spawns an interpreter that imports the program again; and it has no
deadline. torch's `async_save` runs its collectives in the thread, where they would meet the
training's own in an order that differs between ranks. Here a thread touches nothing but its copy
and its file.
"""

from __future__ import annotations

import io
import logging
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_matpo import checkpoint_files as files
from megatron_matpo.config.run import CheckpointConfig
from megatron_matpo.errors import CheckpointError
from megatron_matpo.megatron.control import ControlGroup

_log = logging.getLogger(__name__)

# Room for what is not a tensor of the plan: metadata, manifest, file headers.
_SPARE_FRAC, _SPARE_BYTES = 0.01, 16 << 20


class _HashingFileSystem(FileSystem):
    """torch's file system, but files that it writes are hashed, and stop when told to."""

    def __init__(self) -> None:
        self.entries: dict[str, files.FileEntry] = {}
        self.cancelled = threading.Event()

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Only for writing: reading goes another way."""
        assert mode == "wb", mode
        file = _CancellableFile(Path(path), self.cancelled)
        try:
            yield file
        finally:
            file.close()
        self.entries[Path(path).name] = file.entry()


class _CancellableFile(files.HashingFile):
    def __init__(self, path: Path, cancelled: threading.Event) -> None:
        super().__init__(path)
        self._cancelled = cancelled

    def write(self, data: bytes | memoryview) -> int:
        """Append, unless another rank has failed already."""
        if self._cancelled.is_set():
            raise OSError("given up, because another rank failed")
        return super().write(data)


class _Staged:
    """What this rank has to write, in host memory of its own; stands in for the planner."""

    def __init__(self, planner: MCoreSavePlanner, plan: SavePlan, live: set[int]) -> None:
        """Copy what could still change: tensors whose storage is in `live` or not on the host."""
        self._data: dict[Any, torch.Tensor | io.BytesIO] = {}
        for item in plan.items:
            data: Any = planner.resolve_data(item)
            if isinstance(data, torch.Tensor):
                data = data.detach()
                if not data.is_cpu:
                    data = data.cpu()
                elif data.untyped_storage().data_ptr() in live:
                    data = data.clone()
            self._data[item.index] = data

    def resolve_data(self, item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Hand over one item; its memory is free once it is written."""
        return self._data.pop(item.index)


class _Background:
    """This rank's file, written by a thread."""

    def __init__(self, folder: Path, plan: SavePlan, staged: _Staged) -> None:
        """Start writing."""
        self.problem = ""
        self.results: list[WriteResult] = []
        self._folder, self._plan = folder, plan
        self._files = _HashingFileSystem()
        self._done = threading.Event()
        thread = threading.Thread(target=self._run, args=(staged,), daemon=True)
        thread.name = "checkpoint writer"
        thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether the thread has come to an end, with a problem or without."""
        return self._done.wait(timeout_s)

    def cancel(self) -> None:
        """Make the thread fail at its next write."""
        self._files.cancelled.set()

    @property
    def entries(self) -> dict[str, files.FileEntry]:
        """What was written, by file name."""
        return self._files.entries

    def _run(self, staged: _Staged) -> None:
        try:
            # Copying ahead is for data on a GPU.
            writer = FileSystemWriter(self._folder, sync_files=True, per_thread_copy_ahead=0)
            writer.fs = self._files
            self.results = writer.write_data(self._plan, staged).value()  # type: ignore[arg-type]
        except Exception as error:
            # Reported on all ranks by the next poll, whatever it is.
            self.problem = f"{type(error).__name__}: {error}"
        finally:
            del staged
            self._done.set()


class _Pending:
    """A save between `begin` and `finish`."""

    def __init__(
        self, root: Path, step: int, contents: Mapping[str, bytes], common: dict[str, Any]
    ) -> None:
        self.root, self.step, self.contents, self.common = root, step, contents, common
        self.temporary = files.temporary_folder(root, step)
        self.metadata: Metadata | None = None
        """On rank 0."""
        self.background: _Background | None = None
        self.problem = ""
        """Why this rank could not even start to write."""

    def is_done(self, timeout_s: float = 0.0) -> bool:
        """Whether this rank has nothing more to do before `finish`."""
        return self.background is None or self.background.wait(timeout_s)

    def report(self) -> str:
        """What went wrong on this rank so far."""
        if self.background is not None and self.background.wait(0):
            return self.background.problem
        return self.problem


class CheckpointWriter:
    """Writes checkpoints, one at a time. Every method is collective over all trainer ranks."""

    def __init__(self, config: CheckpointConfig, control: ControlGroup) -> None:
        """Write nothing yet."""
        self._config, self._control = config, control
        self._pending: _Pending | None = None

    def save(
        self,
        root: Path,
        step: int,
        sharded_state: dict[str, Any],
        live: set[int],
        contents: Mapping[str, bytes],
    ) -> None:
        """Begin checkpoint `step`.

        Waits for the one before, and without `checkpoint.asynchronous` for this one too.

        Args:
            root: folder of all checkpoints, shared by all ranks; made if missing.
            step: names the checkpoint; an older one of the same step is replaced.
            sharded_state: this rank's part of everything, in Megatron's terms.
            live: storages (`data_ptr`) on the host that the training goes on to change.
            contents: further files, by name; rank 0's are kept.

        Raises:
            CheckpointError: on every rank, if this or the previous checkpoint cannot be written,
                unless `checkpoint.on_failure` is `warn`. The last complete one is untouched.
            DeadlineError: a wait took longer than `checkpoint.timeout_s`.
        """
        self.wait()
        pending = _Pending(root, step, contents, {})
        prepare = f"cannot prepare {pending.temporary}"
        try:
            self._control.on_first(lambda: files.prepare(pending.temporary), prepare)
            self._begin(pending, sharded_state, live)
        except CheckpointError as error:
            self._give_up(pending, error)
            return
        self._pending = pending
        if not self._config.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Complete the pending save if all ranks have written their files; wait for nothing.

        Raises:
            CheckpointError: on every rank, if a rank could not write, unless
                `checkpoint.on_failure` is `warn`.
        """
        if self._pending is not None:
            self._meet(self._pending, self._control.share(self._report(self._pending, 0.0)))

    def wait(self) -> None:
        """Complete the pending save, if there is one, within `checkpoint.timeout_s`.

        Raises:
            CheckpointError: as `poll`.
            DeadlineError: a rank's file was not written in time.
        """
        pending = self._pending
        if pending is None:
            return
        reports = self._control.share(self._report(pending, self._control.timeout_s))
        self._meet(pending, reports)
        if self._pending is not None:
            late = [rank for rank, (is_done, _) in enumerate(reports) if not is_done]
            raise self._control.expired(
                f"checkpoint {files.step_folder(pending.root, pending.step)}: trainer ranks {late} "
                "have not written their files"
            )

    def _begin(self, pending: _Pending, sharded_state: dict[str, Any], live: set[int]) -> None:
        """Agree on who writes what, check that it fits, copy it, and start to write."""
        sharded: Any
        sharded, pending.common = save_preprocess(sharded_state)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        is_first = self._control.rank == 0
        planner.set_up_planner(mcore_to_pyt_state_dict(by_key, False), is_coordinator=is_first)
        writer = FileSystemWriter(pending.temporary)
        # Without collectives the file names follow from the rank alone.
        writer.set_up_storage_writer(is_first, rank=self._control.rank, use_collectives=False)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        plans = self._control.gather(plan)
        self._control.on_first(
            lambda: _check_space(pending.root, plans, sum(map(len, pending.contents.values()))),
            f"cannot write {pending.temporary}",
        )
        if is_first:
            _, pending.metadata = planner.create_global_plan(plans)
        try:
            staged = _Staged(planner, planner.finish_plan(plan), live)
            pending.background = _Background(pending.temporary, plan, staged)
        except (MemoryError, RuntimeError) as error:
            # On this rank alone: told to the others at the next meeting.
            pending.problem = f"no host memory for the copy: {error}"

    def _report(self, pending: _Pending, timeout_s: float) -> tuple[bool, str]:
        """Whether this rank is done, and what went wrong; returns early when something did."""
        return pending.is_done(timeout_s), pending.report()

    def _meet(self, pending: _Pending, reports: list[tuple[bool, str]]) -> None:
        """Finish if all are done, or give up if one has failed."""
        wrong = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(reports) if text]
        target = files.step_folder(pending.root, pending.step)
        if wrong:
            self._stop_writing(pending)
            error = CheckpointError(f"checkpoint {target} was not written: {'; '.join(wrong)}")
            self._give_up(pending, error)
        elif all(is_done for is_done, _ in reports):
            try:
                self._finish(pending)
            except CheckpointError as error:
                self._give_up(pending, error)

    def _finish(self, pending: _Pending) -> None:
        """All ranks' files are on disk: make them a checkpoint."""
        background = pending.background
        assert background is not None
        written = self._control.gather((background.results, background.entries))
        target = files.step_folder(pending.root, pending.step)
        config = self._config
        self._control.on_first(
            lambda: _complete(pending, written), f"checkpoint {target} was not completed"
        )
        self._pending = None
        self._control.on_first(
            lambda: files.prune(
                pending.root,
                pending.step,
                keep_last=config.keep_last,
                keep_every=config.keep_every,
            ),
            f"{target} is complete, but older checkpoints could not be deleted",
        )

    def _stop_writing(self, pending: _Pending) -> None:
        """Nothing of this rank's touches the folder any more, unless the disk hangs."""
        if pending.background is not None:
            pending.background.cancel()
            pending.is_done(self._control.timeout_s)

    def _give_up(self, pending: _Pending, error: CheckpointError) -> None:
        """Report a failed save on all ranks, as `checkpoint.on_failure` says."""
        self._pending = None
        # No rank writes any more when the folder goes, and it is gone when the ranks go on.
        self._control.share(None)
        self._control.on_first(lambda: files.discard(pending.temporary), "cannot delete")
        if self._config.on_failure == "warn" and self._control.rank == 0:
            _log.warning("%s (checkpoint.on_failure=warn: the run goes on)", error)
        if self._config.on_failure == "stop":
            raise error


def _check_space(root: Path, plans: list[SavePlan], further: int) -> None:
    """Refuse a save that cannot fit. A quota is not seen here; it shows while writing.

    Raises:
        CheckpointError: the file system has less room than plans and `further` bytes need.
    """
    needed = further + sum(_num_bytes(item) for plan in plans for item in plan.items)
    needed += int(needed * _SPARE_FRAC) + _SPARE_BYTES
    free = shutil.disk_usage(root).free
    if free < needed:
        raise CheckpointError(
            f"No space left on device: the checkpoint needs {needed / 1e9:.3f} GB, {root} has "
            f"{free / 1e9:.3f} GB; free some, or keep fewer (checkpoint.keep_last, keep_every)"
        )


def _num_bytes(item: WriteItem) -> int:
    """Of a tensor's part; other items are small."""
    if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
        return 0
    data = item.tensor_data
    dtype = data.properties.dtype
    return data.chunk.sizes.numel() * dtype.itemsize


def _complete(pending: _Pending, written: list[Any]) -> None:
    """Rank 0: everything besides the tensors, then the commit."""
    folder = pending.temporary
    assert pending.metadata is not None
    FileSystemWriter(folder, sync_files=True).finish(
        pending.metadata, [results for results, _ in written]
    )
    TorchCommonSaveStrategy("torch", 1).save_common(pending.common, folder)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    for name, content in pending.contents.items():
        (folder / name).write_bytes(content)
    known = {name: entry for _, entries in written for name, entry in entries.items()}
    files.commit(pending.root, pending.step, known)
