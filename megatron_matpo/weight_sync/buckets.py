"""Named tensors grouped into flat byte buckets, one broadcast each.

A bucket is the concatenation of its tensors' bytes in order, which is what SGLang's
`load_format="flattened_bucket"` expects to receive.
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
    data: Tensor
    """[num_bytes] uint8, contiguous."""
    is_last: bool
    """No tensor follows this bucket's."""


def group_tensors(
    tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int
) -> Iterator[tuple[list[tuple[str, Tensor]], bool]]:
    """Group `tensors` in order into lists of at most `bucket_bytes` (a larger tensor goes alone).

    A group holds one dtype: the receiver views slices of the bytes in place, which needs offsets
    aligned to the element size. At most one group's tensors are alive at a time.

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


def make_buckets(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """The groups of `group_tensors` as flat buckets."""
    for group, is_last in group_tensors(tensors, bucket_bytes):
        yield _flatten(group, is_last=is_last)


def _flatten(pending: list[tuple[str, Tensor]], *, is_last: bool) -> Bucket:
    flat = [tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in pending]
    return Bucket(
        names=tuple(name for name, _ in pending),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in pending),
        shapes=tuple(tuple(tensor.shape) for _, tensor in pending),
        data=torch.cat(flat),
        is_last=is_last,
    )
