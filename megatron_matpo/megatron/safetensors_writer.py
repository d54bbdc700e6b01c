"""A Hugging Face folder's weights, written tensor by tensor.

safetensors' own `save_file` wants all tensors of a file at once. The format is simple enough to be
written as it comes, if names, shapes and dtype are known before: 8 bytes with the length of a
header, the header as JSON (name -> dtype, shape, place), and the values without gaps in the same
order. Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_matpo.obs.files import flush_to_disk

INDEX = "model.safetensors.index.json"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""What can be written, by the format's name."""
_ALIGNMENT = 8


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_file_bytes: int,
) -> None:
    """Write `model.safetensors`, or numbered files and an index, and flush them to disk.

    Args:
        folder: exists.
        shapes: of all tensors, in the order in which they will come.
        dtype: of everything in the files.
        tensors: (name, tensor of any float dtype, on any device).
        max_file_bytes: a file holds at least one tensor, and no more than this otherwise.

    Raises:
        OSError: the disk refused something.
    """
    files = _split(shapes, dtype, max_file_bytes)
    source = iter(tensors)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        file = file if len(files) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(names, file)
        _write_file(folder / file, {name: shapes[name] for name in names}, dtype, source)
    assert next(source, None) is None, "more tensors came than were announced"
    if len(files) > 1:
        total = sum(_num_bytes(shape, dtype) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        flush_to_disk(folder / INDEX)


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _split(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_file_bytes: int
) -> list[list[str]]:
    """Names by file, in order."""
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        size += _num_bytes(shape, dtype)
        if files[-1] and size > max_file_bytes:
            files.append([])
            size = _num_bytes(shape, dtype)
        files[-1].append(name)
    return files


def _write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    source: Iterable[tuple[str, Tensor]],
) -> None:
    """One file; takes as many tensors from `source` as it holds."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + _num_bytes(shape, dtype)
        places = [start, stop]
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": places}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for wanted, (name, tensor) in zip(shapes, source, strict=False):
            assert name == wanted, f"{name} came where {wanted} was expected"
            assert tuple(tensor.shape) == shapes[name], f"{name}: {tuple(tensor.shape)}"
            values = tensor.detach().to("cpu", dtype).contiguous()
            file.write(values.view(-1).view(torch.uint8).numpy().data)
    flush_to_disk(path)
