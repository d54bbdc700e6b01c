"""The actor in one process: what it refuses, what its arguments mean. No second rank is needed.

Numbers are checked against transformers in `tests/dist/test_layouts.py`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.train import ParallelConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.megatron import cpu_backend, hf_io
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.batch import empty_micro_batch
from megatron_matpo.megatron.parallel import ParallelState, destroy_parallel, init_parallel
from tests.helpers.dist import free_port
from tests.helpers.tiny import (
    make_batch,
    make_tiny_model,
    packed,
    reference_logprobs,
    tiny_config,
    unpacked,
    weighted_loss,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("actor") / "model", tied=True)


@pytest.fixture(scope="module")
def state(folder: Path):
    yield init_parallel(tiny_config(folder), rank=0, world_size=1, master_port=free_port())
    destroy_parallel()


def make_actor(config: Config, state: ParallelState) -> MegatronActor:
    actor = MegatronActor(config, HfModelConfig.from_folder(config.model.path), state)
    actor.load_initial()
    return actor


def test_temperature_scales_the_logits(folder, state):
    config = tiny_config(folder)
    hot = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, temperature=1e6))
    batch = make_batch((2, 6), 0)
    ((logprobs, entropy),) = make_actor(hot, state).score([batch])
    trained = batch.loss_mask != 0
    assert torch.allclose(logprobs[trained], torch.tensor(-math.log(101)), atol=1e-4)
    assert torch.allclose(entropy[trained], torch.tensor(math.log(101)), atol=1e-4)
    assert not logprobs[~trained].any() and not entropy[~trained].any()


def test_an_empty_micro_batch_adds_nothing(folder, state):
    batch = make_batch((2, 6), 0)
    alone = make_actor(tiny_config(folder), state)
    accompanied = make_actor(tiny_config(folder), state)
    result = alone.update([batch], weighted_loss, 0)
    assert accompanied.update([batch, empty_micro_batch()], weighted_loss, 0) == result
    for (name, value), (_, other) in zip(alone.export(), accompanied.export(), strict=True):
        assert torch.equal(value, other), name


def test_scoring_leaves_no_trace(folder, state):
    actor = make_actor(tiny_config(folder), state)
    batch = make_batch((2, 6), 0)
    first = actor.update([batch], weighted_loss, 0)
    other = make_actor(tiny_config(folder), state)
    other.score([make_batch((3, 9), 1)])
    assert other.update([batch], weighted_loss, 0) == first


def test_neighbours_in_a_row_are_invisible(folder, state):
    """A sample has the same log-probs alone, first, last, and beside a copy of itself."""
    first, second, third = unpacked(make_batch((3, 9), 0))
    actor = make_actor(tiny_config(folder), state)
    rows = [packed(row) for row in ([first], [second, first, third], [third, first, first])]
    scores = [
        logprobs.split(row.lengths)
        for row, (logprobs, _) in zip(rows, actor.score(rows), strict=True)
    ]
    (alone,), (_, middle, _), (_, again, last) = scores
    for other in (middle, again, last):
        torch.testing.assert_close(other, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_activations_change_nothing(folder, state, mode):
    """Bit for bit; and what is recomputed has gradients at all."""
    batches = [make_batch((2, 6), 0), make_batch((1, 9), 1)]
    kept = make_actor(tiny_config(folder), state)
    again = make_actor(tiny_config(folder, recompute=mode), state)
    assert again._models[0].module.config.recompute_granularity == mode
    before = dict(kept.export())
    for index in range(2):
        expected = kept.update(batches, weighted_loss, index)
        assert again.update(batches, weighted_loss, index) == expected
    for (name, value), (_, other) in zip(kept.export(), again.export(), strict=True):
        assert torch.equal(value, other), name
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize(("mode", "calls"), [("none", 1), ("selective", 2), ("full", 2)])
def test_recomputation_happens(folder, state, mode, calls):
    """Counted at the feed-forward part of the first layer, per update."""
    actor = make_actor(tiny_config(folder, recompute=mode), state)
    seen: list[int] = []
    feed_forward = actor._models[0].module.decoder.layers[0].mlp
    feed_forward.register_forward_hook(lambda *_: seen.append(1))
    actor.update([make_batch((2, 6), 0)], weighted_loss, 0)
    assert len(seen) == calls
    seen.clear()
    actor.score([make_batch((2, 6), 0)])
    assert len(seen) == 1


def test_export_hands_out_copies(folder, state):
    actor = make_actor(tiny_config(folder), state)
    for _, tensor in actor.export():
        tensor.zero_()
    original = load_file(folder / "model.safetensors")
    for name, tensor in actor.export():
        assert torch.equal(tensor, original[name]), name
    assert {t.dtype for _, t in actor.export(torch.bfloat16)} == {torch.bfloat16}


def test_saved_folder_is_a_model_of_transformers(folder, state, tmp_path, monkeypatch):
    """Also when it takes several files; the tokenizer's files come along."""
    source = tmp_path / "source"
    source.mkdir()
    for file in folder.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(hf_io, "_SHARD_BYTES", 20_000)
    config = tiny_config(source)
    actor = make_actor(config, state)
    batch = make_batch((2, 6), 0)
    actor.update([batch], weighted_loss, 0)
    for _ in range(2):  # the second time replaces
        actor.save_hf(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    ((logprobs, _),) = actor.score([batch])
    ((expected, _),) = reference_logprobs(tmp_path / "out", [batch])
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    again = make_actor(tiny_config(tmp_path / "out"), state)
    for (name, value), (_, other) in zip(actor.export(), again.export(), strict=True):
        assert torch.equal(value, other), name


def test_a_folder_without_its_tensors_is_refused(folder, state, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=r"has no \*\.safetensors file"):
        make_actor(tiny_config(tmp_path), state)
    weights = load_file(folder / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"1 of 46 tensors are missing.*'model\.norm\.weight'"):
        make_actor(tiny_config(tmp_path), state)
    save_file({**weights, "model.norm.weight": norm[:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight give a parameter of shape \[31\]"):
        make_actor(tiny_config(tmp_path), state)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"parallel": ParallelConfig(expert=2)}, "parallel.expert=2: must divide tensor x context"),
        ({"parallel": ParallelConfig(data=2)}, "= 2, but 1 trainer ranks"),
    ],
    ids=["expert", "world"],
)
def test_what_the_platform_cannot_do_is_refused(folder, changes, expected):
    config = dataclasses.replace(tiny_config(folder), **changes)
    with pytest.raises(ConfigError, match=expected):
        init_parallel(config, rank=0, world_size=1, master_port=1)


def test_the_cpu_backend_leaves_torch_alone():
    cpu_backend.install()
    cpu_backend.install()
    import megatron.core.optimizer.clip_grads as of_megatron

    assert of_megatron.torch is not torch
    assert of_megatron.torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
