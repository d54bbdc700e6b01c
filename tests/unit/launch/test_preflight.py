"""Proves that wrong keys, values, files and datasets are told in one error before a start."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.launch import preflight
from megatron_matpo.launch.preflight import check_recipe
from megatron_matpo.wire import recording_path

POLICY = Path(__file__).parents[3] / "examples" / "smallworld" / "policy"
ROW = {
    "data_source": "fake",
    "prompt": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "question?"},
    ],
    "reward_model": {"ground_truth": "answer", "style": "rule"},
    "extra_info": {"question": "question?", "index": 0},
}


def problems_of(recipe, *overrides: str, command="train") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_recipe(str(recipe), list(overrides), command)
    return str(caught.value).splitlines()


@pytest.fixture
def recipe(tmp_path):
    """A recipe that passes, with a replay folder, so that no rollout environment is needed."""
    import sys

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Qwen3ForCausalLM"],
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "intermediate_size": 128,
                "vocab_size": 512,
                "rope_theta": 10000.0,
                "max_position_embeddings": 40960,
            }
        )
    )
    (model / "model.safetensors").touch()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(POLICY / name, model)
    pq.write_table(pa.Table.from_pylist([ROW]), tmp_path / "train.parquet")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "demos.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
        model: {{path: {model}}}
        data: {{train: {tmp_path}/train.parquet}}
        sft: {{data: {tmp_path}/demos.jsonl}}
        rollout: {{planner: main, python: {sys.executable}}}
        agents: {{main: {{role: planner}}}}
        """
    )
    return path


def test_a_good_recipe_passes_for_both_commands(recipe):
    check_recipe(str(recipe), [], "train")
    check_recipe(str(recipe), [], "sft")


def test_violations_of_every_kind_come_together(recipe):
    lines = problems_of(
        recipe,
        "rollout.num_server=2",
        "run.steps=0",
        "model.path=no/model",
        "data.train=no/file.parquet",
        "cluster.host=192.0.2.1",
    )
    assert [line.split("=")[0] for line in lines] == [
        "rollout.num_server",
        "run.steps",
        "model.path",
        "data.train",
        "cluster.host",
    ]


def test_a_dataset_without_a_column_is_refused(recipe, tmp_path):
    row = {key: value for key, value in ROW.items() if key != "reward_model"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    (line,) = problems_of(recipe)
    assert line.startswith("data.train=")
    assert "reward_model" in line


def test_data_sets_are_found_by_name(recipe, tmp_path):
    folder = tmp_path / "data" / "matpo_train_musique"
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / "train.parquet", folder / "train-00000-of-00001.parquet")
    overrides = [f"data.folder={tmp_path}/data", "data.train=matpo_train_musique"]
    check_recipe(
        str(recipe), [*overrides, "eval.every=1", "eval.sets=[matpo_train_musique]"], "train"
    )
    (line,) = problems_of(recipe, *overrides[:1], "data.train=matpo_train_music")
    assert line.startswith("data.train=matpo_train_music: neither a data set in data.folder=")
    assert "that folder has: matpo_train_musique" in line


def test_what_is_not_parquet_is_refused(recipe, tmp_path):
    (tmp_path / "train.parquet").write_text("no")
    (line,) = problems_of(recipe)
    assert "not a parquet file" in line


def test_a_dataset_for_another_mode_is_refused(recipe, tmp_path):
    offer = {"role": "system", "content": "## Server name: browser_agent\n"}
    row = {**ROW, "prompt": [offer, ROW["prompt"][1]]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    (line,) = problems_of(recipe, "rollout.prompts=dataset")
    assert line.startswith("data.train=")
    assert "browser_agent" in line
    check_recipe(str(recipe), ["rollout.prompts=rendered"], "train")


def test_evaluation_needs_questions(recipe):
    (line,) = problems_of(recipe, "eval.every=5")
    assert line.startswith("eval.sets=[]: evaluation needs at least one")


def test_sft_needs_its_conversations_only(recipe):
    check_recipe(str(recipe), ["data.train=no/file", "rollout.python=no/python"], "sft")
    (line,) = problems_of(recipe, "sft.data=no/file", command="sft")
    assert line == "sft.data=no/file: no such file"


def test_sglangs_router_must_be_installed_if_it_is_asked_for(recipe):
    here = f"rollout.python={sys.executable}"
    check_recipe(str(recipe), [here], "train")
    (line,) = problems_of(recipe, here, "rollout.router=sglang")
    assert line.startswith(f"rollout.router=sglang: {sys.executable} has no package sglang_router")


def test_replay_needs_no_dataset_and_no_engines(recipe, tmp_path):
    overrides = ["data.train=", "rollout.python=no/python", f"rollout.replay={tmp_path}"]
    for step in (1, 2):
        recording_path(tmp_path, step).touch()
    check_recipe(str(recipe), [*overrides, "run.steps=2"], "train")
    (line,) = problems_of(recipe, *overrides, "run.steps=3")
    assert line.startswith(f"rollout.replay={tmp_path}: has no step_000003.rollout")


def test_conversations_are_read_before_anything_starts(recipe, tmp_path):
    (tmp_path / "demos.jsonl").write_text("not json\n")
    (line,) = problems_of(recipe, command="sft")
    assert f"{tmp_path}/demos.jsonl: line 1: not valid JSON" in line


def test_an_export_never_replaces_what_is_not_a_model(recipe, tmp_path):
    (line,) = problems_of(recipe, f"sft.export={tmp_path}", command="sft")
    assert line.startswith(f"sft.export={tmp_path}: exists and is not a model folder")
    check_recipe(str(recipe), [f"sft.export={tmp_path / 'model'}"], "sft")


def test_a_template_that_cannot_be_appended_to_is_told(recipe, tmp_path):
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    assert any("cannot be used for multi-turn agents" in p for p in problems_of(recipe))


@pytest.mark.parametrize(
    ("capability", "refused"), [((8, 0), True), ((9, 0), False), (None, False)]
)
def test_the_driver_says_whether_the_gpu_has_fp8(monkeypatch, capability, refused):
    monkeypatch.setattr(preflight, "ask_driver", lambda: capability)
    base = Config(precision="fp8", cluster=ClusterConfig(gpus_per_node=8))
    lines = [line for line in preflight.machine_violations(base, "sft") if "precision" in line]
    assert bool(lines) == refused
    if refused:
        assert lines[0].startswith("precision=fp8: this GPU (sm_80) has no FP8")
