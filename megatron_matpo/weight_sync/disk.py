"""Transport `disk`: a folder per version on a file system that trainer and engines share.

For engines that no process group reaches. The folder is written while engines still generate, is
complete or absent under its name, and goes when the next version is served.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from megatron_matpo.errors import WeightSyncError
from megatron_matpo.types import PolicyVersion
from megatron_matpo.weight_sync.engines import Engines

WriteFolder = Callable[[Path, Iterator[tuple[str, Tensor]]], None]
"""Writes tensors as a Hugging Face folder; see `hf_io.write_hf_folder`."""


class DiskTransport:
    """Folders `version_N` in `folder`; at most the served one and the next exist."""

    def __init__(self, folder: Path, write: WriteFolder, *, flush_cache: bool = True) -> None:
        """`write` puts a complete folder at a path, in one step.

        `flush_cache`: engines forget cached prefixes when they load it.
        """
        self._folder = folder.resolve()
        self._write = write
        self._flush_cache = flush_cache

    async def connect(self, engines: Engines) -> None:
        """Remove what an earlier attempt of the run left.

        Raises:
            WeightSyncError: the disk refused it.
        """
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise WeightSyncError(f"weight_sync.folder: {error}") from error

    async def prepare(self, version: PolicyVersion, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Write the folder.

        Raises:
            WeightSyncError: the disk refused something.
        """
        try:
            # Not in another thread: there is nothing to do beside it, and the export's collectives
            # stay in this one.
            shutil.rmtree(self._path(version), ignore_errors=True)  # of an earlier attempt
            self._write(self._path(version), tensors)
        except OSError as error:
            raise WeightSyncError(f"writing {self._path(version)}: {error}") from error

    async def deliver(self, version: PolicyVersion, engines: Engines) -> int:
        """Have all engines load the folder, and remove the others.

        Raises:
            WeightSyncError: an engine could not load it inside the deadline.
        """
        path = self._path(version)
        await engines.all(
            f"loading {path}",
            lambda e: e.update_weights_from_disk(
                folder=str(path),
                weight_version=str(version),
                flush_cache=self._flush_cache,
                deadline_s=engines.request_s,
            ),
        )
        num_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        for other in self._folder.iterdir():
            if other != path:
                await asyncio.to_thread(shutil.rmtree, other, ignore_errors=True)
        return num_bytes

    def follow(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """A push on a rank other than 0: only take part in the export."""
        for _ in tensors:
            pass

    async def abandon(self, engines: Engines) -> None:
        """Nothing is under way: the export ended in `prepare`."""

    async def close(self) -> None:
        """Leave nothing on the disk: checkpoints hold the weights."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, version: PolicyVersion) -> Path:
        return self._folder / f"version_{version}"
