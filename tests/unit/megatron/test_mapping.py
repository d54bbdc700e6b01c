"""The table of names: complete, inverse to itself, and reading no more than each rank needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron.families import Sharding
from megatron_matpo.megatron.mapping import hf_shapes, hf_tensors, local_part, placed_rules
from tests.helpers.hf_models import FAMILIES, NUM_LAYERS, random_config, write_model


@pytest.fixture(scope="module", params=[(f, s) for f in FAMILIES for s in range(3)], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, seed = request.param
    return write_model(random_config(family, seed), tmp_path_factory.mktemp("mapping") / "model")


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_names_and_shapes_are_those_of_the_folder(folder, weights):
    hf = HfModelConfig.from_folder(folder)
    assert hf_shapes(hf) == {name: tuple(weights[name].shape) for name in hf_shapes(hf)}
    assert set(hf_shapes(hf)) == set(weights)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_parts_and_wholes_are_inverse(folder, weights, tp):
    hf = HfModelConfig.from_folder(folder)
    for rule in placed_rules(hf):
        numel_read = 0

        def read(name, dim, start, stop):
            nonlocal numel_read
            part = weights[name] if dim is None else weights[name].narrow(dim, start, stop - start)
            numel_read += part.numel()
            return part

        parts = [local_part(rule, read, hf, rank, tp) for rank in range(tp)]
        assert len({part.shape for part in parts}) == 1
        whole = hf_tensors(rule, parts if rule.sharding.is_split else parts[:1], hf)
        assert list(whole) == list(rule.hf)
        for name, tensor in whole.items():
            assert torch.equal(tensor, weights[name]), name
        total = sum(weights[name].numel() for name in rule.hf)
        assert numel_read == total * (1 if rule.sharding.is_split else tp)


def test_rows_of_a_group_are_query_key_value(tmp_path):
    """One key/value head for four ranks: 2 query heads, a key and a value head in quarters."""
    config = random_config("qwen2", 0)
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 8})
    hf = HfModelConfig.from_folder(write_model(config, tmp_path / "model"))
    rules = {rule.megatron[0]: rule for rule in placed_rules(hf)}
    bias = rules["decoder.layers.0.self_attention.linear_qkv.bias"]
    values = {"q": torch.arange(8), "k": torch.arange(8, 12), "v": torch.arange(12, 16)}

    def read(name, dim, start, stop):
        return values[name.split(".")[-2][0]].narrow(dim, start, stop - start)

    parts = [local_part(bias, read, hf, rank, 4).tolist() for rank in range(4)]
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    two_groups = dataclasses.replace(hf, num_kv_heads=2, head_dim=4)
    values = {"q": torch.arange(8), "k": torch.arange(8, 16), "v": torch.arange(16, 24)}
    parts = [local_part(bias, read, two_groups, rank, 2).tolist() for rank in range(2)]
    assert parts == [[*range(4), *range(8, 12), *range(16, 20)],
                     [*range(4, 8), *range(12, 16), *range(20, 24)]]  # fmt: skip


def test_padded_vocabulary_rows_are_zero(folder, weights):
    hf = HfModelConfig.from_folder(folder)
    embedding = next(placed_rules(hf))
    table = weights[embedding.hf[0]]
    last = local_part(embedding, lambda _n, _d, start, stop: table[start:stop], hf, 1, 2)
    # 101 rows are padded to 102: 51 for each of two ranks.
    assert last.shape[0] == 51
    assert torch.equal(last[:50], table[51:])
    assert not last[50].any()


@pytest.mark.parametrize(("pp", "vp", "ep"), [(1, 1, 1), (2, 1, 2), (4, 1, 1), (2, 2, 4)])
def test_every_layout_exports_in_the_same_order(folder, pp, vp, ep):
    hf = HfModelConfig.from_folder(folder)
    rules = list(placed_rules(hf, pp, vp, ep))
    exported = [name for rule in rules if not rule.is_copy for name in rule.hf]
    assert exported == list(hf_shapes(hf))
    # Layers go round the stages, once per chunk.
    order = [chunk * pp + stage for chunk in range(vp) for stage in range(pp)]
    assert list(dict.fromkeys(rule.chunk * pp + rule.stage for rule in rules)) == order
    copies = [rule for rule in rules if rule.is_copy]
    # Only tied embeddings that live on two stages need a copy.
    assert len(copies) == int(hf.tie_word_embeddings and pp > 1)
    if hf.moe is not None:
        experts = [rule.expert_rank for rule in rules if rule.sharding is Sharding.STACKED]
        per_layer = [e // (hf.moe.num_experts // ep) for e in range(hf.moe.num_experts)]
        assert experts == per_layer * sum(hf.moe.layers)
        assert len(hf.moe.layers) == NUM_LAYERS
