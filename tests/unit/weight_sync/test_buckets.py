"""Buckets keep order, names and bytes, and respect the size bound."""

import pytest
import torch

from megatron_matpo.weight_sync.buckets import make_buckets


def named():
    torch.manual_seed(0)
    return [
        ("a", torch.randn(4, 6)),
        ("b", torch.randn(3).bfloat16()),
        ("c", torch.randn(64, 2)),
        ("d", torch.randn(5, 5).t()),
    ]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("limit", [1, 100, 200, 1 << 20])
def test_buckets_rebuild_the_tensors(limit, flat):
    rebuilt = []
    buckets = list(make_buckets(named(), limit, flat=flat))
    assert [bucket.is_last for bucket in buckets] == [False] * (len(buckets) - 1) + [True]
    for bucket in buckets:
        assert len(bucket.parts) == (1 if flat else len(bucket.names))
        assert all(part.is_contiguous() for part in bucket.parts)
        data = torch.cat([part.view(-1).view(torch.uint8) for part in bucket.parts])
        at = 0
        for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
            kind = getattr(torch, dtype)
            count = torch.Size(shape).numel() * kind.itemsize
            rebuilt.append((name, data[at : at + count].view(kind).reshape(shape)))
            at += count
        assert at == bucket.num_bytes
        assert at <= limit or len(bucket.names) == 1
    assert [name for name, _ in rebuilt] == ["a", "b", "c", "d"]
    for (_, left), (_, right) in zip(rebuilt, named(), strict=True):
        assert torch.equal(left, right)
