"""`matpo export`: a checkpoint of several ranks becomes a folder that transformers loads as it is.

Proved against the trainer's own log-probs and its own export, bit for bit. Not proved here: that
SGLang loads the folder (it reads the same files as transformers).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_matpo.__main__ import main
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.lora import LoraConfig
from megatron_matpo.config.train import ParallelConfig
from megatron_matpo.errors import CheckpointError
from megatron_matpo.megatron import export as worker
from megatron_matpo.megatron.export import export
from megatron_matpo.megatron.mapping import hf_shapes
from tests.helpers.checkpoint_ranks import train_and_score
from tests.helpers.hf_models import random_config, write_model
from tests.helpers.tiny import make_batch, make_tiny_model, reference_logprobs, tiny_config

pytestmark = pytest.mark.dist

BATCHES = [make_batch((3, 11), 0), make_batch((2, 7), 1)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def trained(request, ranks, tmp_path_factory):
    """A run's folder after two updates at TP2 (tied) or PP2, its model, and what rank 0 knows."""
    root = tmp_path_factory.mktemp("export")
    model = make_tiny_model(root / "model", tied=request.param)
    (model / "tokenizer.json").write_text("{}")
    layout = {"tp": 2} if request.param else {"pp": 2}
    config = tiny_config(model, timeout_s=300.0, **layout)
    stories = ranks.run(train_and_score, 2, config, BATCHES, root / "run" / "checkpoints")
    scores = next(story["scores"] for story in stories if story["scores"])
    return root / "run", model, stories[0]["weights"], scores


@pytest.fixture
def worker_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of `matpo export` in this one, which has imported torch and Megatron already."""

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", worker.__name__] and not check
        monkeypatch.setattr(sys, "argv", command[2:])
        return subprocess.CompletedProcess(command, worker.main())

    monkeypatch.setattr("megatron_matpo.launch.export.subprocess.run", run)


@pytest.mark.usefixtures("worker_here")
def test_transformers_loads_it_and_gives_the_trainer_s_logprobs(trained, tmp_path, capfd):
    run, model, weights, scores = trained
    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert f"{out}: {run / 'checkpoints' / 'step_2'} in float32" in capfd.readouterr().out
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(exported[name], value), name
    for (actual, _), (want, _) in zip(scores, reference_logprobs(out, BATCHES), strict=True):
        torch.testing.assert_close(actual.double(), want, rtol=1e-5, atol=1e-5)
    assert (out / "tokenizer.json").is_file()
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    moved = reference_logprobs(model, BATCHES)[0][0] - scores[0][0]
    assert float(moved.abs().max()) > 1e-3, "the policy has moved"


def test_bf16_in_several_files(trained, tmp_path):
    run, model, weights, _ = trained
    out, bound = tmp_path / "out", 20_000
    export(
        run / "checkpoints" / "step_1",
        out,
        dtype=torch.bfloat16,
        source=model,
        max_file_bytes=bound,
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and {path.name for path in files} == set(index["weight_map"].values())
    sizes = 0
    for path in files:
        tensors = load_file(path)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= bound or len(tensors) == 1
        sizes += size
        with safe_open(path, framework="pt") as reader:
            assert reader.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == sizes
    assert list(index["weight_map"]) == list(hf_shapes(HfModelConfig.from_folder(model)))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"

    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype is torch.bfloat16
    first = "model.layers.0.mlp.gate_proj.weight"
    ours = dict(loaded.named_parameters())[first]
    # Step 1; `weights` are of step 2.
    assert ours.shape == weights[first].shape and not torch.equal(ours.float(), weights[first])


@pytest.mark.usefixtures("worker_here")
def test_an_existing_folder_stays_unless_forced(trained, tmp_path, capfd):
    run, _, _, _ = trained
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    assert main(["export", str(run), "--out", str(out)]) == 2
    assert "--force" in capfd.readouterr().err
    assert (out / "precious").read_text() == "mine"
    assert main(["export", str(run / "checkpoints" / "step_2"), "--out", str(out), "--force"]) == 0
    assert (out / "model.safetensors").is_file() and not (out / "precious").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("worker_here")
def test_refusals_name_what_is_there(trained, tmp_path, capfd):
    run, _, _, _ = trained
    assert main(["export", str(run), "--step", "7"]) == 1
    assert "no checkpoint step_7; complete ones: step_2, step_1" in capfd.readouterr().err
    assert main(["export", str(run), "--model", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "config.json" in capfd.readouterr().err
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.tmp").exists()


def test_a_model_that_was_not_trained_is_refused(trained, tmp_path):
    run, model, _, _ = trained
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((model / "config.json").read_text())
    for changes, message in (
        ({"num_hidden_layers": 2}, "2 parts of it"),
        ({"tie_word_embeddings": not config["tie_word_embeddings"]}, "output_layer.weight"),
    ):
        (other / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=message):
            export(run / "checkpoints" / "step_2", tmp_path / "out", source=other)
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(trained, tmp_path):
    run, _, _, _ = trained
    import shutil

    copy = tmp_path / "step_1"
    shutil.copytree(Path(run) / "checkpoints" / "step_1", copy)
    data = copy / "__0_0.distcp"
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: damaged"):
        export(copy, tmp_path / "out")


def test_adapters_are_merged(ranks, tmp_path):
    """As the engines get them; TP2 splits B's rows by kv group, PP2 the layers."""
    model = make_tiny_model(tmp_path / "model", tied=True)
    lora = LoraConfig(rank=3, targets=["q_proj", "v_proj", "up_proj", "down_proj"])
    config = replace(tiny_config(model, timeout_s=300.0, tp=2, pp=2), lora=lora)
    folder = tmp_path / "run" / "checkpoints"
    stories = ranks.run(train_and_score, 4, config, BATCHES, folder)
    original = load_file(model / "model.safetensors")
    # As a user does it, with its own process.
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == stories[0]["weights"].keys()
    for name, value in stories[0]["weights"].items():
        # The product of whole matrices rounds otherwise than that of a rank's parts.
        torch.testing.assert_close(exported[name], value, rtol=0, atol=1e-6)
        is_target = name.split(".")[-2] in lora.layers
        assert torch.equal(exported[name], original[name]) != is_target, name


def test_experts_and_chunks_come_from_where_they_lie(ranks, tmp_path):
    """Experts of two ranks, on two stages of two chunks each; some layers without experts."""
    config = random_config("qwen3_moe", 1)
    model = write_model(config, tmp_path / "model")
    layout = ParallelConfig(pipeline=2, virtual=2, data=2, expert=2)
    run = replace(tiny_config(model, timeout_s=300.0), parallel=layout)
    folder = tmp_path / "run" / "checkpoints"
    stories = ranks.run(train_and_score, 4, run, BATCHES, folder)
    export(folder / "step_2", tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == stories[0]["weights"].keys()
    for name, value in stories[0]["weights"].items():
        assert torch.equal(exported[name], value), name
