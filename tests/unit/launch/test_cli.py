"""Proves the command line: exit codes, no tracebacks for wrong recipes, and reading commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_matpo import __version__
from megatron_matpo.__main__ import main
from megatron_matpo.config import Config
from megatron_matpo.config.run import RunConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.launch.run_folder import open_run_folder
from megatron_matpo.obs.failure import record_failure
from megatron_matpo.obs.span_files import SpanFile, attempt_of
from megatron_matpo.obs.spans import Span
from megatron_matpo.obs.status import PhaseWriter
from tests.helpers.trace import check_trace


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {name: demo, steps: 5}\n")
    return str(path)


def test_config_prints_the_resolved_configuration(recipe, capsys):
    assert main(["config", recipe, "optim.lr=1e-4"]) == 0
    output = capsys.readouterr().out
    assert "name: demo" in output
    assert "lr: 0.0001" in output


def test_a_wrong_recipe_is_exit_code_2_without_a_traceback(recipe):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_matpo", "train", recipe, "run.stepz=3"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert "run.stepz=3: no such key; did you mean run.steps?" in done.stderr
    assert "model.path=" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debugging_shows_tracebacks(recipe, monkeypatch):
    monkeypatch.setenv("MATPO_DEBUG", "1")
    with pytest.raises(ConfigError):
        main(["config", recipe, "run.stepz=3"])


def test_overrides_may_follow_options(recipe, capsys):
    assert main(["train", recipe, "--accept-changes", "run.stepz=3"]) == 2
    assert "run.stepz=3: no such key" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["train"], ["fly"], [], ["config", "x", "--what"]])
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: matpo" in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"matpo {__version__}"


def test_status_tells_phases_and_the_first_failure(tmp_path, capsys):
    config = replace(Config(), run=RunConfig(name="demo", dir=str(tmp_path)))
    folder, _ = open_run_folder(config, "train")
    PhaseWriter(folder.path, "trainer", 0).set("rollout", 3)
    record_failure(folder.path, "manager", 0, "serve", ValueError("no tools"), "")
    assert main(["status", str(folder.path)]) == 0
    running = capsys.readouterr().out
    os.close(folder.lock_descriptor)
    assert main(["status", str(folder.path)]) == 0
    stopped = capsys.readouterr().out
    assert f"{folder.path}: running" in running
    assert f"{folder.path}: not running" in stopped
    assert "trainer-0: step 3 rollout since" in running
    assert "first failure: manager-0, phase serve: ValueError: no tools" in running


def test_trace_writes_the_timeline_of_a_step(tmp_path, capsys):
    config = replace(Config(), run=RunConfig(name="demo", dir=str(tmp_path)))
    folder, _ = open_run_folder(config, "train")
    os.close(folder.lock_descriptor)
    assert main(["trace", str(folder.path)]) == 2
    assert "obs.trace_every" in capsys.readouterr().err
    file = SpanFile(folder.path, "trainer-0", 10, attempt_of(folder.path))
    file.add(Span("train", ("", ""), 1.0, 2.0, {}))
    file.end()
    file.wait(10.0)
    assert main(["trace", str(folder.path), "--step", "10"]) == 0
    path = folder.path / "trace" / "step_000010.json"
    assert str(path) in capsys.readouterr().out
    assert list(check_trace(json.loads(path.read_text())).values()) == [("trainer", "rank 0")]


@pytest.mark.parametrize("command", ["status", "report", "trace"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, command, capsys):
    assert main([command, str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
