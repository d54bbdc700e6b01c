"""Proves that a run folder has one supervisor at a time, and that a resumed run is the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_matpo.config import Config, load_resolved
from megatron_matpo.config.run import RunConfig
from megatron_matpo.errors import ConfigError, MatpoError
from megatron_matpo.launch.run_folder import is_in_use, open_run_folder
from megatron_matpo.obs.failure import first_failure, record_failure


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(run=RunConfig(name="demo", dir=str(tmp_path)))


def open_and_close(config: Config, command: str = "train", **options) -> bool:
    """As a supervisor whose run saved a checkpoint and ended; returns whether it was resumed."""
    import os

    folder, is_resumed = open_run_folder(config, command, **options)
    (folder.path / "checkpoints" / "latest").write_text("step_1")
    os.close(folder.lock_descriptor)
    return is_resumed


def test_a_new_folder_holds_the_configuration(config, tmp_path):
    assert open_and_close(config) is False
    assert load_resolved(str(tmp_path / "demo" / "config.yaml")) == config
    for name in ("logs", "status", "rollouts", "checkpoints"):
        assert (tmp_path / "demo" / name).is_dir()


def test_a_second_supervisor_is_refused_and_told_who_the_first_is(config, tmp_path):
    code = (
        "import sys; from megatron_matpo.config.load import load_recipe; "
        "from megatron_matpo.launch.run_folder import open_run_folder; "
        f"c = load_recipe('{tmp_path}/r.yaml', []); "
        "f = open_run_folder(c, 'train'); print('open', flush=True); sys.stdin.read()"
    )
    (tmp_path / "r.yaml").write_text(f"run: {{name: demo, dir: '{tmp_path}'}}")
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    assert is_in_use(tmp_path / "demo")
    with pytest.raises(MatpoError, match=rf"another run is using this folder \(pid {other.pid}\)"):
        open_run_folder(config, "train")
    other.kill()
    other.wait()
    assert not is_in_use(tmp_path / "demo")


def test_an_attempt_without_a_checkpoint_binds_nobody(config, tmp_path):
    open_and_close(config)
    (tmp_path / "demo" / "checkpoints" / "latest").unlink()
    other = replace(config, algo=replace(config.algo, clip_low=0.3))
    assert open_and_close(other) is False
    assert load_resolved(str(tmp_path / "demo" / "config.yaml")) == other


def test_a_folder_that_cannot_be_made_names_the_setting(config, tmp_path):
    (tmp_path / "file").touch()
    broken = replace(config, run=replace(config.run, dir=str(tmp_path / "file")))
    with pytest.raises(ConfigError, match=r"run\.dir=.*/file: the run's folder cannot be made"):
        open_run_folder(broken, "train")


def test_length_and_records_may_change(config):
    open_and_close(config)
    changed = replace(
        config,
        run=replace(config.run, steps=7, start_timeout_s=9.0),
        checkpoint=replace(config.checkpoint, every=1),
        obs=replace(config.obs, wandb_mode="disabled"),
        train=replace(config.train, timeout_s=5.0),
    )
    assert open_and_close(changed) is True


def test_other_changes_are_listed_and_must_be_accepted(config):
    open_and_close(config)
    changed = replace(
        config,
        optim=replace(config.optim, lr=1.0),
        parallel=replace(config.parallel, tensor=2),
        run=replace(config.run, steps=7),
    )
    with pytest.raises(ConfigError) as caught:
        open_run_folder(changed, "train")
    lines = str(caught.value).splitlines()
    assert "--accept-changes" in lines[0]
    assert lines[1:] == ["  optim.lr: 1e-05 -> 1.0", "  parallel.tensor: 1 -> 2"]
    assert open_and_close(changed, accept_changes=True) is True
    assert open_and_close(changed) is True


def test_an_evaluation_with_results_binds_but_not_what_only_a_trainer_reads(config, tmp_path):
    import os

    def start(config: Config, command: str = "eval") -> bool:
        folder, is_resumed = open_run_folder(config, command)
        os.close(folder.lock_descriptor)
        return is_resumed

    assert start(config) is False
    assert start(replace(config, compat="reference")) is False, "no results yet"
    start(config)
    results = tmp_path / "demo" / "eval" / "gaia" / "results.jsonl"
    results.parent.mkdir(parents=True)
    results.touch()
    changed = replace(
        config,
        optim=replace(config.optim, lr=1.0),
        parallel=replace(config.parallel, tensor=2),
        eval=replace(config.eval, samples_per_row=9),
    )
    assert start(changed) is True
    with pytest.raises(ConfigError, match=r"rollout\.temperature: 1\.0 -> 0\.5"):
        start(replace(config, rollout=replace(config.rollout, temperature=0.5)))
    with pytest.raises(ConfigError, match="holds a `matpo eval` run"):
        start(config, "train")


def test_a_refused_run_leaves_the_folder_unlocked_and_unchanged(config, tmp_path):
    open_and_close(config)
    with pytest.raises(ConfigError):
        open_run_folder(replace(config, precision="fp32"), "train")
    assert not is_in_use(tmp_path / "demo")
    assert load_resolved(str(tmp_path / "demo" / "config.yaml")) == config


def test_a_folder_belongs_to_one_command(config):
    open_and_close(config, "sft")
    with pytest.raises(ConfigError, match="holds a `matpo sft` run"):
        open_run_folder(config, "train")


def test_failures_of_the_earlier_attempt_are_forgotten(config, tmp_path):
    open_and_close(config)
    record_failure(tmp_path / "demo", "trainer", 0, "train", ValueError("old"), "")
    open_and_close(config)
    assert first_failure(tmp_path / "demo") is None
