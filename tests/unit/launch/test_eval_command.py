"""Proves what `matpo eval` makes of its command line, and what it refuses before it starts."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_matpo.__main__ import main
from megatron_matpo.config import Config, load_recipe
from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.config.train import ParallelConfig
from megatron_matpo.config.validate import collect_violations
from megatron_matpo.launch.console import Console
from megatron_matpo.launch.eval import EvalRequest, EvalView, default_name
from megatron_matpo.launch.origin import find_origin
from megatron_matpo.launch.roles import plan_roles
from megatron_matpo.launch.run_secrets import RunSecrets
from megatron_matpo.obs.failure import record_failure
from megatron_matpo.obs.status import PhaseWriter
from tests.helpers.plans import lone_plan

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
POLICY = str(ROOT / "examples" / "smallworld" / "policy")


@pytest.mark.parametrize(
    ("recipe", "model", "name"),
    [
        ("recipes/gaia.yaml", "runs/first/checkpoints/hf", "eval-gaia-first"),
        ("recipes/gaia.yaml", "models/Qwen3 14B/", "eval-gaia-Qwen3_14B"),
        ("gaia.yaml", "hf", "eval-gaia-model"),
    ],
)
def test_the_run_is_called_after_recipe_and_model(recipe, model, name):
    assert default_name(recipe, model) == name


def resolved(**fields) -> Config:
    request = EvalRequest(**({"recipe": QUICKSTART, "model": "a, b=[c]", "data": []} | fields))
    return load_recipe(QUICKSTART, request.all_overrides())


def test_options_replace_what_the_recipe_says():
    config = resolved(data=["x y.parquet", "gaia"], samples=4, max_rows=7)
    assert config.model.path == "a, b=[c]"
    assert config.eval.sets == ["x y.parquet", "gaia"]
    assert (config.eval.samples_per_row, config.eval.max_rows) == (4, 7)
    assert (config.data.train, config.rollout.replay) == ("", "")
    assert config.run.name == "eval-quickstart-a_b_c_"


def test_without_options_the_recipes_sets_are_taken_and_the_user_names_the_run():
    config = resolved(overrides=["run.name=mine", "model.path=other"])
    assert config.eval.sets == ["examples/smallworld/data/matpo_eval.parquet"]
    assert config.run.name == "mine"
    assert config.model.path == "a, b=[c]", "--model wins"


def refused(capsys, tmp_path, *arguments: str) -> str:
    """The message; exit code 2 and no run folder."""
    code = main(["eval", QUICKSTART, *arguments, f"run.dir={tmp_path}/runs"])
    assert code == 2
    assert not (tmp_path / "runs").exists()
    return capsys.readouterr().err


def test_a_missing_model_folder(capsys, tmp_path):
    text = refused(capsys, tmp_path, "--model", "/nowhere/model")
    assert "model.path=/nowhere/model: no such folder" in text


def test_an_unknown_set_is_named_also_before_an_override(capsys, tmp_path):
    text = refused(capsys, tmp_path, "--model", POLICY, "--data", "gaja", "eval.max_rows=3")
    (line,) = text.splitlines()
    assert line.startswith("eval.sets=gaja: ") and "matpo_val_gaia_repeat_8" in line


def test_an_evaluation_without_sets(capsys, tmp_path):
    assert "eval.sets=[]" in refused(capsys, tmp_path, "--model", POLICY, "eval.sets=[]")


def test_two_sets_of_one_name(capsys, tmp_path):
    sets = ["a/gaia.parquet", "b/gaia.parquet"]
    text = refused(capsys, tmp_path, "--model", POLICY, "--data", *sets)
    assert "eval.sets=b/gaia.parquet: its results would be called 'gaia'" in text


def test_a_model_of_another_architecture(capsys, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    text = refused(capsys, tmp_path, "--model", str(folder))
    assert "GPT2LMHeadModel" in text and "Qwen3ForCausalLM" in text


def test_wrong_numbers(capsys, tmp_path):
    options = ["--model", POLICY, "--samples", "0", "--max-rows", "-1"]
    text = refused(capsys, tmp_path, *options)
    assert "eval.samples_per_row=0" in text and "eval.max_rows=-1" in text


def test_engines_take_all_gpus_and_no_trainer_is_started(tmp_path):
    base = Config()
    config = replace(
        base,
        cluster=ClusterConfig(gpus_per_node=4),
        parallel=ParallelConfig(tensor=4),
        rollout=replace(base.rollout, num_servers=2, tensor=2),
    )
    plan = lone_plan(config, has_trainer=False)
    assert [place.gpus for place in plan.engines] == [(0, 1), (2, 3)]
    roles = plan_roles(config, plan, tmp_path, "eval", RunSecrets())
    assert [role.name for role in roles] == ["engine-0", "engine-1", "manager", "evaluation"]
    assert [role.name for role in roles if role.ends_run] == ["evaluation"]
    assert not any("num_servers" in x for x in collect_violations(config, command="eval"))
    assert any("num_servers" in x for x in collect_violations(config, command="train"))


def test_the_evaluation_is_ready_when_it_says_anything(tmp_path):
    config = Config()
    plan = lone_plan(config, has_trainer=False)
    role = plan_roles(config, plan, tmp_path, "eval", RunSecrets())[-1]
    assert not role.is_ready()
    PhaseWriter(tmp_path, "evaluation", 0).set("connect")
    assert role.is_ready()


def test_a_failed_evaluation_is_named_with_its_log(tmp_path):
    record_failure(tmp_path, "evaluation", 0, "evaluate", ValueError("no"), "")
    origin = find_origin(tmp_path, [])
    assert origin is not None
    assert (origin.name, origin.log_name) == ("evaluation", "evaluation")


def test_progress_is_shown_once_per_chunk(tmp_path):
    stream = io.StringIO()
    view, writer = EvalView(tmp_path, Console(stream)), PhaseWriter(tmp_path, "evaluation", 0)
    view.update()
    counts = {"wanted": 4, "scored": 0, "failed": 0, "accuracy_sum": 0.0}
    writer.set("ask", sets={"gaia": counts})
    view.update()
    assert stream.getvalue() == "", "nothing has come yet"
    writer.set("ask", sets={"gaia": counts | {"scored": 2, "accuracy_sum": 1.0, "failed": 1}})
    view.update()
    view.update()
    assert stream.getvalue() == (
        "gaia: 2 of 4 episodes, mean accuracy 50.00, 1 failed outside the model\n"
    )
