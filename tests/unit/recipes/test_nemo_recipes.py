"""The recipes through the real NeMo-Run: tasks, factories, its command line, a local executor.

Proved: what would run is `matpo train`, `sft` or `eval` of that recipe with the changes asked for,
and that a local executor runs it in the repository. `matpo` itself is played by a program that
writes down how it was called. Slurm: the tests of `matpo launch`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_matpo.errors import ConfigError
from megatron_matpo.launch.nemo_tasks import RecipeJob, executor_shape, job_task, train_task

run = pytest.importorskip("nemo_run")
ROOT = Path(__file__).parents[3]
BIG = "recipes/matpo-qwen3-14b-16n8g-a800.yaml"
EVAL = "recipes/eval-qwen3-14b-2n8g-a800.yaml"


@pytest.fixture(autouse=True)
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def words(script) -> list[str]:
    """Folder and command of a task."""
    change, command = script.inline.strip().splitlines()
    assert change == f"cd {ROOT} || exit 2"
    first, python, *rest = shlex.split(command)
    assert (first, python) == ("exec", ".venv/bin/python")
    return rest


def test_a_task_is_the_one_command_of_every_node():
    script = train_task(BIG, ["optim.lr=2e-6", "data.folder=/a b"])
    assert isinstance(script, run.Script)
    assert words(script) == [
        "-m", "megatron_matpo", "train", BIG, "optim.lr=2e-6", "data.folder=/a b",
    ]  # fmt: skip


def test_typed_settings_become_overrides_and_the_user_s_own_come_last():
    job = RecipeJob(
        recipe=BIG,
        model="/models/Qwen3-14B",
        name="first",
        data_folder="/data",
        steps=3,
        num_nodes=8,
        overrides=["run.steps=4"],
    )
    assert words(job_task(job)) == [
        "-m", "megatron_matpo", "train", BIG, "run.name=first", "data.folder=/data",
        "run.steps=3", "cluster.num_nodes=8", "model.path=/models/Qwen3-14B", "run.steps=4",
    ]  # fmt: skip


def test_a_recipe_without_training_data_is_an_evaluation():
    job = RecipeJob(recipe=EVAL, model="runs/first/checkpoints/hf", overrides=["eval.max_rows=8"])
    assert words(job_task(job)) == [
        "-m", "megatron_matpo", "eval", EVAL, "--model", "runs/first/checkpoints/hf",
        "eval.max_rows=8",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="needs `model`"):
        job_task(RecipeJob(recipe=EVAL))


def test_a_recipe_with_conversations_is_supervised_training():
    task = job_task(RecipeJob(recipe="recipes/example_sft.yaml", name="warm"))
    assert words(task) == [
        "-m", "megatron_matpo", "sft", "recipes/example_sft.yaml", "run.name=warm",
    ]  # fmt: skip


def test_mistakes_are_found_before_anything_is_submitted():
    with pytest.raises(ConfigError, match=r"optim\.learning_rate=1"):
        train_task(BIG, ["optim.learning_rate=1"])
    with pytest.raises(ConfigError, match="no such recipe file"):
        train_task("recipes/nowhere.yaml")
    # A folder on another machine cannot be looked at.
    assert "recipes/nowhere.yaml" in train_task("recipes/nowhere.yaml", folder="/far/away").inline


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [
        (BIG, {"nodes": 16, "ntasks_per_node": 1, "gpus_per_node": 8}),
        ("recipes/quickstart.yaml", {"nodes": 1, "ntasks_per_node": 1}),
    ],
)
def test_an_executor_is_told_the_recipe_s_machine(recipe, shape):
    assert executor_shape(RecipeJob(recipe=recipe)) == shape
    executor = run.SlurmExecutor(
        account="me", tunnel=run.LocalTunnel(job_dir=""), **executor_shape(RecipeJob(recipe=recipe))
    )
    assert executor.nodes == shape["nodes"]


def test_every_recipe_has_a_factory_of_nemo_run():
    from nemo_run.config import get_type_namespace

    from recipes import nemo

    files = sorted((ROOT / "recipes").glob("*.yaml"))
    assert sorted(nemo.RECIPES.values()) == [f"recipes/{file.name}" for file in files]
    registered = run.cli.list_factories(f"{get_type_namespace(nemo.train)}.job")
    made = {factory().recipe for factory in registered}
    assert made == set(nemo.RECIPES.values())
    name = "single_qwen3_4b_1n8g_a800"
    assert nemo.recipe_job(name) == RecipeJob(recipe="recipes/single-qwen3-4b-1n8g-a800.yaml")


def command_line(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """NeMo-Run's command line on the entry point, in a process of its own."""
    return subprocess.run(
        [sys.executable, "recipes/nemo.py", "--yes", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "NEMORUN_HOME": str(tmp_path / "nemo"),
            "COLUMNS": "400",
        },
    )


def recorder(tmp_path: Path) -> Path:
    """A program that writes its folder and its arguments to `called`."""
    program = tmp_path / "python"
    called = tmp_path / "called"
    program.write_text(f'#!/bin/sh\n{{ pwd; for word; do echo "$word"; done; }} > {called}\n')
    program.chmod(0o755)
    return program


@pytest.mark.slow
def test_a_dry_run_of_the_command_line_starts_nothing(tmp_path):
    done = command_line(
        tmp_path, "--dryrun", "run.executor=local", "job=matpo_qwen3_4b_1n8g_a800",
        "job.model=/models/Qwen3-4B", "job.steps=100", "job.overrides=['optim.lr=2e-6']",
        f"job.python={recorder(tmp_path)}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("recipes/matpo-qwen3-4b-1n8g-a800.yaml", "steps=100", "'optim.lr=2e-6'", "dryrun"):
        assert part in done.stdout
    assert not (tmp_path / "called").exists()


@pytest.mark.slow
def test_the_command_line_runs_a_recipe_with_a_local_executor(tmp_path):
    done = command_line(
        tmp_path, "run.executor=local", "job=quickstart", "job.steps=2",
        f"job.python={recorder(tmp_path)}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    called = (tmp_path / "called").read_text().splitlines()
    assert called == [
        str(ROOT), "-m", "megatron_matpo", "train", "recipes/quickstart.yaml", "run.steps=2",
    ]  # fmt: skip
