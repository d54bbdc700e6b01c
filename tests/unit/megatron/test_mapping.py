"""The table of names: complete, inverse to itself, and reading no more than each rank needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron.mapping import (
    Sharding,
    hf_shapes,
    hf_tensors,
    local_part,
    placed_rules,
)
from tests.helpers.tiny import make_tiny_model


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("mapping") / "model", tied=request.param)


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_names_and_shapes_are_those_of_the_folder(folder, weights):
    hf = HfModelConfig.from_folder(folder)
    assert hf_shapes(hf) == {name: tuple(weights[name].shape) for name in hf_shapes(hf)}
    assert set(hf_shapes(hf)) == set(weights)


@pytest.mark.parametrize("tp", [1, 2])
def test_parts_and_wholes_are_inverse(folder, weights, tp):
    hf = HfModelConfig.from_folder(folder)
    for rule in placed_rules(hf, 1):
        numel_read = 0

        def read(name, dim, start, stop):
            nonlocal numel_read
            part = weights[name] if dim is None else weights[name].narrow(dim, start, stop - start)
            numel_read += part.numel()
            return part

        parts = [local_part(rule, read, hf, rank, tp) for rank in range(tp)]
        whole = hf_tensors(rule, parts, hf)
        assert list(whole) == list(rule.hf)
        for name, tensor in whole.items():
            assert torch.equal(tensor, weights[name]), name
        total = sum(weights[name].numel() for name in rule.hf)
        assert numel_read == total * (tp if rule.sharding is Sharding.REPLICATED else 1)


def test_padded_vocabulary_rows_are_zero(folder, weights):
    hf = HfModelConfig.from_folder(folder)
    embedding = next(placed_rules(hf, 1))
    table = weights[embedding.hf[0]]
    last = local_part(embedding, lambda _n, _d, start, stop: table[start:stop], hf, 1, 2)
    # 101 rows are padded to 102: 51 for each of two ranks.
    assert last.shape[0] == 51
    assert torch.equal(last[:50], table[51:])
    assert not last[50].any()


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_every_layout_exports_in_the_same_order(folder, pp):
    hf = HfModelConfig.from_folder(folder)
    exported = [name for rule in placed_rules(hf, pp) if not rule.is_copy for name in rule.hf]
    assert exported == list(hf_shapes(hf))
    stages = [rule.stage for rule in placed_rules(hf, pp)]
    assert stages == sorted(stages) and set(stages) == set(range(pp))
    copies = [rule for rule in placed_rules(hf, pp) if rule.is_copy]
    # Only tied embeddings that live on two stages need a copy.
    assert len(copies) == int(hf.tie_word_embeddings and pp > 1)
