"""Proves that the trainer's two checksums are SGLang's, and the layout that of its layers.

The values of the GPU's checksum were made by SGLang 0.5.20's own Triton kernel, run by Triton's
interpreter on a CPU (TRITON_INTERPRET=1). A real engine on a CPU is asked in tests/smoke.
"""

import struct

import pytest
import torch
import xxhash

from megatron_matpo.weight_sync.checksums import device_checksum, host_checksum
from megatron_matpo.weight_sync.layout import EngineLayout, EngineShape


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    kinds = [
        (5, torch.float32),
        (7, torch.bfloat16),
        (8192, torch.float32),
        (20001, torch.float32),
        (50001, torch.bfloat16),
    ]
    return [torch.randn(count, generator=generator).to(dtype) for count, dtype in kinds]


def test_device_checksum_is_that_of_sglangs_kernel(tensors):
    """One tile and several, whole and not, an odd number of bytes of a word."""
    assert [device_checksum(tensor) for tensor in tensors] == [
        "8f4e26d6985fb5a6",
        "16a623728a6c69f4",
        "ba332a8a36b97023",
        "8d288affe05aad6c",
        "7bfffd6c06f8ba0e",
    ]


def test_device_checksum_does_not_depend_on_how_much_is_hashed_at_a_time(tensors, monkeypatch):
    expected = [device_checksum(tensor) for tensor in tensors]
    monkeypatch.setattr("megatron_matpo.weight_sync.checksums._CHUNK_WORDS", 8192)
    assert [device_checksum(tensor) for tensor in tensors] == expected


@pytest.mark.parametrize("checksum", [host_checksum, device_checksum])
@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_not_the_same_bytes_in_the_same_places_changes_it(checksum, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = int(torch.randint(2, 300, (1,), generator=generator))
    columns = int(torch.randint(2, 200, (1,), generator=generator))
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    tensor = torch.randn(rows, columns, generator=generator).to(dtype)
    at = int(torch.randint(tensor.nbytes, (1,), generator=generator))
    one_bit = tensor.clone()
    one_bit.view(-1).view(torch.uint8)[at] ^= 1 << (seed % 8)
    swapped_rows = tensor.clone()
    swapped_rows[[0, 1]] = tensor[[1, 0]]
    zeroed = tensor.clone()
    zeroed[rows // 2] = 0
    swapped_halves = tensor.view(-1).roll(tensor.numel() // 2)
    others = {
        "one bit": one_bit,
        "two rows swapped": swapped_rows,
        "two neighbours swapped": tensor.view(-1)[[1, 0, *range(2, tensor.numel())]],
        "halves swapped": swapped_halves,
        "shifted by an element": tensor.view(-1).roll(1),
        "transposed": tensor.t().contiguous(),
        "a row zeroed": zeroed,
        "all zero": torch.zeros_like(tensor),
        "one row less": tensor[:-1],
        "a step older": tensor + torch.full_like(tensor, 0.01),
    }
    sums = {name: checksum(other) for name, other in others.items()}
    assert checksum(tensor) not in sums.values()
    assert len(set(sums.values())) == len(sums), "and differently"
    assert checksum(tensor.clone()) == checksum(tensor)
    strided = tensor[:, ::2]
    assert checksum(strided) == checksum(strided.clone()), "also of strided ones"


def test_host_checksum_is_that_of_the_engines_hook():
    """The value is XXH3's for these 16 bytes; tests/smoke asks an engine."""
    assert host_checksum(torch.arange(4.0)) == xxhash.xxh3_64_hexdigest(
        struct.pack("<4f", 0, 1, 2, 3)
    )
    assert host_checksum(torch.empty(0)) == "2d06800538d394c2"


def layout_of(named, *, num_ranks, num_kv_heads=2):
    layout = EngineLayout(EngineShape(num_ranks, num_kv_heads, torch.float32))
    return {
        engine_name: parts
        for name, tensor in named.items()
        for engine_name, parts in layout.take(name, tensor)
    }


def test_fused_parameters_of_two_ranks():
    q, k, v = torch.rand(8, 3), torch.rand(4, 3), torch.rand(4, 3)
    gate, up, down = torch.rand(6, 3), torch.rand(6, 3), torch.rand(3, 6)
    parts = layout_of(
        {
            "l.self_attn.q_proj.weight": q,
            "l.self_attn.k_proj.weight": k,
            "l.self_attn.v_proj.weight": v,
            "l.mlp.gate_proj.weight": gate,
            "l.mlp.up_proj.weight": up,
            "l.mlp.down_proj.weight": down,
            "l.mlp.experts.0.up_proj.weight": up,
        },
        num_ranks=2,
    )
    assert set(parts) == {
        "l.self_attn.qkv_proj.weight",
        "l.mlp.gate_up_proj.weight",
        "l.mlp.down_proj.weight",
    }
    torch.testing.assert_close(
        parts["l.self_attn.qkv_proj.weight"][1], torch.cat([q[4:], k[2:], v[2:]])
    )
    torch.testing.assert_close(parts["l.mlp.gate_up_proj.weight"][0], torch.cat([gate[:3], up[:3]]))
    torch.testing.assert_close(parts["l.mlp.down_proj.weight"][1], down[:, 3:])


def test_ranks_beyond_the_kv_heads_share_them():
    q, k = torch.rand(8, 3), torch.rand(2, 3)
    named = {"a.q_proj.weight": q, "a.k_proj.weight": k, "a.v_proj.weight": -k}
    parts = layout_of(named, num_ranks=4, num_kv_heads=2)["a.qkv_proj.weight"]
    for rank, head in enumerate((0, 0, 1, 1)):
        expected = torch.cat([q[2 * rank : 2 * rank + 2], k[[head]], -k[[head]]])
        torch.testing.assert_close(parts[rank], expected)


def test_the_vocabulary_is_padded_with_zeros_then_cut():
    embedding = torch.rand(70, 2)
    whole, upper = (
        layout_of({"model.embed_tokens.weight": embedding}, num_ranks=n)[
            "model.embed_tokens.weight"
        ]
        for n in (1, 2)
    )
    assert whole[0].shape == (128, 2)
    torch.testing.assert_close(whole[0][:70], embedding)
    torch.testing.assert_close(upper[1], torch.cat([embedding[64:], torch.zeros(58, 2)]))


def test_on_a_cpu_the_feed_forward_dimension_is_padded():
    gate, down = torch.rand(48, 3), torch.rand(3, 48)
    layout = EngineLayout(EngineShape(1, 2, torch.float32, on_cpu=True))
    assert not list(layout.take("l.mlp.gate_proj.weight", gate))
    ((_, (fused,)),) = layout.take("l.mlp.up_proj.weight", -gate)
    zeros = torch.zeros(16, 3)
    torch.testing.assert_close(fused, torch.cat([gate, zeros, -gate, zeros]))
    ((_, (padded,)),) = layout.take("l.mlp.down_proj.weight", down)
    torch.testing.assert_close(padded, torch.cat([down, zeros.t()], dim=1))
