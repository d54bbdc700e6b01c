"""Reads single tensors of a checkpoint in one process: no process group, no layout, no GPU.

In memory at a time: the tensor that is asked for, and one rank's part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


class CheckpointReader:
    """The tensors of a checkpoint's folder, by the keys that Megatron gives them.

    Layers lie along a leading axis of one tensor: `decoder.layers.mlp.linear_fc1.weight` is
    [layers, 2 f, h].
    """

    def __init__(self, folder: Path) -> None:
        """Read the metadata of a complete checkpoint."""
        self._reader = FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, True)
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by key."""
        return {key: tuple(entry.size) for key, entry in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        """Of the tensor as it was saved."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, index: Sequence[int] = ()) -> Tensor:
        """The tensor of `key`, or its part at `index` along the leading axes."""
        entry = self._tensors[key]
        lead = len(index)
        offsets = torch.Size([*index, *(0 for _ in entry.size[lead:])])
        sizes = torch.Size([*(1 for _ in index), *entry.size[lead:]])
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(offsets=offsets, sizes=sizes)
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        covered = sum(torch.Size(item.lengths).numel() for item in items)
        assert covered == target.numel(), f"{key}: {covered} of {target.numel()} values were saved"
        self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        return target.reshape(entry.size[lead:])


class _Into(DefaultLoadPlanner):
    """Puts everything that is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The place of one item."""
        place: Any = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            place = place.narrow(dim, start, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The item was copied into its place already."""
