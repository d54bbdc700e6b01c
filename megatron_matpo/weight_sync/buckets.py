"""Named tensors grouped into buckets, which an engine receives and loads one at a time.

A flat bucket is the concatenation of its tensors' bytes in order, one broadcast, which is what
SGLang's `load_format="flattened_bucket"` expects to receive. In another one each tensor is a
broadcast of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    """As torch spells them without the prefix: `float32`, `bfloat16`."""
    shapes: tuple[tuple[int, ...], ...]
    parts: tuple[Tensor, ...]
    """What is broadcast, in order: the tensors, contiguous; or [num_bytes] uint8 if flat."""
    is_flat: bool
    is_last: bool
    """No tensor follows this bucket's."""
    num_bytes: int
    """Of all tensors."""


def group_tensors(
    tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int
) -> Iterator[tuple[list[tuple[str, Tensor]], bool]]:
    """Group `tensors` in order into lists of at most `bucket_bytes` (a larger tensor goes alone).

    A group holds one dtype: the receiver of a flat bucket views slices of the bytes in place, which
    needs offsets aligned to the element size. At most one group's tensors are alive at a time.

    Yields:
        A group, and whether no tensor follows it.
    """
    pending: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        other_dtype = bool(pending) and pending[-1][1].dtype != tensor.dtype
        if pending and (other_dtype or size + num_bytes > bucket_bytes):
            yield pending, False
            pending, size = [], 0
        pending.append((name, tensor))
        size += num_bytes
    if pending:
        yield pending, True


def make_buckets(
    tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int, *, flat: bool
) -> Iterator[Bucket]:
    """The groups of `group_tensors` as buckets."""
    for group, is_last in group_tensors(tensors, bucket_bytes):
        yield _bucket(group, flat=flat, is_last=is_last)


def _bucket(pending: list[tuple[str, Tensor]], *, flat: bool, is_last: bool) -> Bucket:
    parts = [tensor.detach().contiguous() for _, tensor in pending]
    if flat:
        parts = [torch.cat([part.view(-1).view(torch.uint8) for part in parts])]
    return Bucket(
        names=tuple(name for name, _ in pending),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in pending),
        shapes=tuple(tuple(tensor.shape) for _, tensor in pending),
        parts=tuple(parts),
        is_flat=flat,
        is_last=is_last,
        num_bytes=sum(part.nbytes for part in parts),
    )
