"""Proves what `matpo launch` shows, refuses and writes; nothing is submitted here."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import yaml

from megatron_matpo.errors import ConfigError
from megatron_matpo.launch import launch as module
from megatron_matpo.launch.executors import Submission
from megatron_matpo.launch.inspect import status_text
from megatron_matpo.launch.launch import LaunchRequest, launch, prepare
from megatron_matpo.launch.logs import LogsRequest, show_logs
from tests.helpers.matpo import QUICKSTART, ROOT

EXAMPLE = str(ROOT / "slurm" / "cluster.example.yaml")
SECRET = "sk-planted-0123456789"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    import nemo_run.config

    monkeypatch.setattr(nemo_run.config, "_NEMORUN_HOME", str(tmp_path / "nemo"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return tmp_path / "nemo"


def cluster(tmp_path: Path, **settings) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_a_dry_run_shows_everything_and_starts_nothing(capsys, home):
    overrides = ["cluster.base_port=4000", "run.name=x"]
    assert launch(LaunchRequest(QUICKSTART, EXAMPLE, dry_run=True, overrides=overrides)) == 0
    text = capsys.readouterr().out
    parts = [line.strip("= ") for line in text.splitlines() if line.startswith("====")]
    assert parts == [
        *("resolved configuration", "nodes", "memory", "batch script", "script of each node")
    ]
    assert "samples_per_prompt: 8" in text
    assert "node 0   trainer ranks 0-1        rendezvous 4000" in text
    assert "node 0   engine 0, CPU            port 4003, internal 4004" in text
    assert "optimizer                             1.0" in text
    assert "#SBATCH --job-name=matpo-x" in text
    assert "slurm_task --preflight --run-dir runs/x train" in text
    assert text.rstrip().endswith("nothing was started")
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_sixteen_nodes(capsys):
    recipe = str(ROOT / "recipes" / "matpo-qwen3-14b-16n8g-a800.yaml")
    assert launch(LaunchRequest(recipe, EXAMPLE, dry_run=True)) == 0
    text = capsys.readouterr().out
    assert "node 7   trainer ranks 56-63" in text
    assert "node 15  engine 31, GPUs 6,7" in text
    assert "#SBATCH --nodes=16" in text
    assert "#SBATCH --gres=gpu:8" in text
    assert "64 ranks: TP 4" in text


def test_mistakes_of_recipe_and_cluster_file_are_told_together(tmp_path):
    file = cluster(tmp_path, kind="local", slurm={"acount": "a"})
    request = LaunchRequest(QUICKSTART, file, overrides=["run.stepz=1", "cluster.num_nodes=2"])
    with pytest.raises(ConfigError) as error:
        prepare(request)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("slurm.acount=a: no such key; did you mean slurm.account?")
    assert lines[1] == "run.stepz=1: no such key; did you mean run.steps?"
    assert lines[-1] == "cluster.num_nodes=2: kind=local is one node"


def test_a_container_without_a_mount_for_runs(tmp_path):
    file = cluster(tmp_path, container={"image": "i", "mounts": ["/data:/data"]}, run_dir="/runs")
    with pytest.raises(ConfigError, match="none holds the run's folder /runs/quickstart"):
        prepare(LaunchRequest("recipes/quickstart.yaml", file))
    with pytest.raises(ConfigError, match="name the recipe as seen from the repository"):
        prepare(LaunchRequest(QUICKSTART, file))


def test_the_cluster_says_where_runs_are_and_the_user_has_the_last_word(tmp_path):
    file = cluster(tmp_path, run_dir="/shared/runs")
    assert prepare(LaunchRequest(QUICKSTART, file))[2].run_dir == "/shared/runs/quickstart"
    mine = LaunchRequest(QUICKSTART, file, overrides=["run.dir=/mine"])
    assert prepare(mine)[2].run_dir == "/mine/quickstart"


def test_a_secret_among_the_overrides_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    out = tmp_path / "job.sbatch"
    request = LaunchRequest(
        QUICKSTART,
        cluster(tmp_path, secret_env=["MY_KEY"]),
        write=str(out),
        overrides=[f"obs.wandb_project={SECRET}"],
    )
    with pytest.raises(ConfigError, match="the value of MY_KEY is in the recipe") as error:
        launch(request)
    assert SECRET not in str(error.value)
    assert not out.exists()


def test_a_secret_that_nobody_has_is_missed_before_the_queue(tmp_path, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    file = cluster(tmp_path, secret_env=["MY_KEY"])
    with pytest.raises(ConfigError, match="MY_KEY is not set here, and there is no secret_file"):
        launch(LaunchRequest(QUICKSTART, file))


def test_what_this_machine_can_check_is_checked_before_the_queue(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.train=nowhere: "):
        launch(LaunchRequest(QUICKSTART, EXAMPLE, overrides=["data.train=nowhere"]))


def test_what_a_run_refuses_anywhere_is_refused_before_the_queue(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    recipe = "recipes/matpo-qwen3-14b-16n8g-a800.yaml"
    overrides = ["rollout.num_servers=33"]
    with pytest.raises(ConfigError) as error:
        launch(LaunchRequest(recipe, EXAMPLE, overrides=overrides))
    placed, weights = str(error.value).splitlines()
    assert placed.startswith("rollout.num_servers=33: only 32 engines of rollout.tensor=2 GPUs fit")
    assert weights.startswith("model.path=recipes/models/qwen3-14b: has no *.safetensors")
    assert launch(LaunchRequest(recipe, EXAMPLE, dry_run=True, overrides=overrides)) == 0
    refused = capsys.readouterr().err.splitlines()
    assert [line for line in refused if line.startswith("warning: a run refuses")] == [
        f"warning: a run refuses this recipe: {line}" for line in (placed, weights)
    ]


def test_a_key_that_no_job_would_have_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.chdir(ROOT)
    recipe = "recipes/eval-qwen3-14b-2n8g-a800.yaml"

    def warned(file: str) -> list[str]:
        assert launch(LaunchRequest(recipe, file, model="m", dry_run=True)) == 0
        lines = capsys.readouterr().err.splitlines()
        return [
            line.partition(":")[2].partition(": the job")[0] for line in lines if "_KEY" in line
        ]

    search = " tools.servers.search_and_scrape_webpage.env_from=SERPER_API_KEY"
    assert warned(EXAMPLE) == [search]
    assert warned(cluster(tmp_path, secret_env=["SERPER_API_KEY"], secret_file="~/keys")) == []
    away = {
        "bare": {"repository": "/shared/matpo"},
        "ssh": {"host": "login", "user": "me", "job_dir": "/shared/jobs"},
    }
    judge = " reward.judge.api_key_env=OPENAI_API_KEY"
    assert sorted(warned(cluster(tmp_path, **away))) == [judge, search]


def test_an_evaluation_has_its_model(capsys):
    model = str(ROOT / "examples" / "smallworld" / "policy")
    request = LaunchRequest(QUICKSTART, EXAMPLE, "eval", model, overrides=["run.seed=2"])
    job = prepare(request)[2]
    assert job.words[:4] == ("eval", QUICKSTART, "--model", model)
    assert job.words[-1] == "run.seed=2"
    assert job.run_dir == "runs/eval-quickstart-policy"
    with pytest.raises(ConfigError, match="--model FOLDER: needed for an evaluation"):
        prepare(LaunchRequest(QUICKSTART, EXAMPLE, "eval"))


def test_a_run_that_has_a_job_already(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "queued_job", lambda run_dir: f"job 7, RUNNING on {run_dir.name}")
    with pytest.raises(
        ConfigError, match=r"run\.name=x: job 7, RUNNING on x, is a job of this run"
    ):
        launch(LaunchRequest(QUICKSTART, EXAMPLE, overrides=["run.name=x"]))


def test_an_environment_that_is_not_there(tmp_path):
    file = cluster(tmp_path, bare={"repository": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"bare\.python=\.venv/bin/python: no such file in "):
        launch(LaunchRequest(QUICKSTART, file))


def test_what_to_do_after_submitting(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "submit", lambda job, cluster: Submission("12", "/nemo/e"))
    file = cluster(tmp_path, bare={"repository": str(tmp_path), "python": sys.executable})
    assert launch(LaunchRequest(QUICKSTART, file, overrides=["run.name=x"])) == 0
    assert capsys.readouterr().out.splitlines() == [
        "submitted job 12: matpo-x, 1 node(s)",
        "  log      runs/x/logs/slurm-12.log",
        "  follow   matpo logs runs/x -f",
        "  state    matpo status runs/x",
        "  cancel   scancel 12",
        "  files    /nemo/e",
    ]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert status_text(str(tmp_path / "runs" / "x")).splitlines()[1:] == [
        "  slurm job 12: state unknown (no squeue here)"
    ]
    assert show_logs(LogsRequest(str(tmp_path / "runs" / "x"), lines=0, role="")) == 0


def test_a_job_that_failed_here_fails_the_command(tmp_path, monkeypatch):
    failed = Submission("", "/nemo/e", succeeded=False)
    monkeypatch.setattr(module, "submit", lambda job, cluster: failed)
    assert launch(LaunchRequest(QUICKSTART, cluster(tmp_path, kind="local"))) == 1
