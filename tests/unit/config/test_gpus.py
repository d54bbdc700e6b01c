"""Proves which row of the table a device's name finds; the figures are the makers'."""

from __future__ import annotations

import pytest

from megatron_matpo.config.gpus import peak_flops


@pytest.mark.parametrize(
    ("name", "is_fp8", "expected"),
    [
        ("NVIDIA A800-SXM4-80GB", False, 312e12),
        ("NVIDIA A800-SXM4-80GB", True, 312e12),
        ("NVIDIA H100 80GB HBM3", False, 989e12),
        ("NVIDIA H100 80GB HBM3", True, 1979e12),
        ("NVIDIA H100 PCIe", False, 756e12),
        ("NVIDIA H100 PCIe", True, 1512e12),
        ("NVIDIA H800", False, 989e12),
        ("NVIDIA H200", False, 989e12),
        ("NVIDIA GeForce RTX 4090", False, 0.0),
    ],
)
def test_peaks(name, is_fp8, expected):
    assert peak_flops(name, is_fp8=is_fp8) == expected
