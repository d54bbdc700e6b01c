"""The two checksums of SGLang's weight checker, so that the trainer can compute what it expects.

Both are 64 bits of a tensor's bytes, written as 16 hexadecimal digits. They find transmission
errors and mix-ups; they are no defence against somebody who forges weights.
"""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

_MASK_32 = 0xFFFFFFFF
_MASK_64 = (1 << 64) - 1
_SEED_1 = 0x243F6A88
_SEED_2 = ((_SEED_1 * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK_32
_POSITION_1, _POSITION_2 = 0x27D4EB2D, 0x165667B1
_TILE_WORDS = 8192
_CHUNK_WORDS = 256 * _TILE_WORDS
"""So many 32-bit words are hashed at a time: 16 MiB each of some 64-bit temporaries."""


def host_checksum(tensor: Tensor) -> str:
    """What an engine on a CPU says: XXH3 (64 bits) of the tensor's bytes.

    Set by `rollout/sglang_cpu/serve.py` in the place of SGLang's SHA-256, which takes longer than
    the weights need to come over.
    """
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_64_hexdigest(data.data)


@torch.inference_mode()
def device_checksum(tensor: Tensor) -> str:
    """What an engine on a GPU says; computed on the tensor's own device.

    Source: SGLang 0.5.20, kernels/ops/memory/gpu_tensor_hash.py. The kernel's 32-bit arithmetic is
    done here in 64 bits and cut off.
    """
    words = _as_words(tensor)
    num_bytes = 4 * words.numel()
    if num_bytes == 0:
        return f"{0:016x}"
    sums = [0, 0]
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS].to(torch.int64) & _MASK_32
        at = torch.arange(start, start + chunk.numel(), device=chunk.device)
        for i, (factor, seed, turn) in enumerate(
            ((_POSITION_1, _SEED_1, 15), (_POSITION_2, _SEED_2, 13))
        ):
            mixed = _mix(chunk ^ ((at * factor + seed) & _MASK_32) ^ _rotate(at, turn))
            padded = torch.nn.functional.pad(mixed, (0, -mixed.numel() % _TILE_WORDS))
            tiles = padded.view(-1, _TILE_WORDS).sum(dim=1) & _MASK_32
            sums[i] += int(_mix(tiles ^ (num_bytes & _MASK_32)).sum())
    return f"{_finish((sums[0] << 32) + sums[1]):016x}"


def _as_words(tensor: Tensor) -> Tensor:
    """[n] int32: the bytes, padded with zeros."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.numel() % 4:
        data = torch.nn.functional.pad(data, (0, -data.numel() % 4))
    return data.view(torch.int32)


def _rotate(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK_32


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finalizer, on 32-bit values held in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK_32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK_32
    return x ^ (x >> 16)


def _finish(x: int) -> int:
    """splitmix64's finalizer."""
    x &= _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)
