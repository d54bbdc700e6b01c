"""Proves what a cluster file may say, that all mistakes are told at once, and no secret is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_matpo.config.cluster_file import ClusterFile, load_cluster_file
from megatron_matpo.config.schema import known_paths
from megatron_matpo.errors import ConfigError
from tests.helpers.matpo import ROOT

SECRET = "sk-planted-0123456789"


def load(tmp_path: Path, text: str) -> ClusterFile:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return load_cluster_file(str(path))


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    return [
        line.replace(f" (in {tmp_path}/cluster.yaml)", "") for line in str(error.value).splitlines()
    ]


def test_the_example_is_the_defaults():
    assert load_cluster_file(str(ROOT / "slurm" / "cluster.example.yaml")) == ClusterFile()


def test_every_commented_setting_of_the_example_exists(tmp_path):
    lines = (ROOT / "slurm" / "cluster.example.yaml").read_text().splitlines()
    # Settings that are commented out, as they would stand without the `# `.
    shown = [re.sub(r"^( *)# ", r"\1", line) for line in lines]
    settings = [line for line in shown if re.match(r" *[a-z_A-Z]+:( |$)", line)]
    text = "\n".join(dict.fromkeys(settings))
    loaded = load(tmp_path, text.replace("run_dir: /runs", "", 1))
    assert loaded.slurm.account == "my_project"
    assert loaded.ssh.job_dir == "/shared/me/matpo_jobs"
    assert loaded.container.mounts[0] == "/shared/me/runs:/runs"
    assert loaded.slurm.exclude == ["node007", "node[012-013]"]
    assert loaded.secret_env[0] == "SERPER_API_KEY"
    assert loaded.env["NCCL_DEBUG"] == "WARN"


def test_the_example_shows_every_setting():
    text = (ROOT / "slurm" / "cluster.example.yaml").read_text()
    names = {path.rsplit(".", 1)[-1] for path in known_paths(ClusterFile)}
    assert {name for name in names if f"{name}:" not in text} == set()


def test_all_mistakes_are_told_at_once(tmp_path):
    found = problems(
        tmp_path,
        """
        kind: slrum
        slrum: {account: a}
        slurm:
          acount: a
          time_limit: 24:00:00
          max_restarts: -1
          exclude: node1
          options: [--output=x, comment, "--a b"]
          signal: KILL
        bare: {repository: here}
        ssh: {host: h}
        container: {mounts: [/a]}
        """,
    )
    assert found == [
        'slurm.time_limit=86400: write it in quotes, as "24:00:00"',
        "slrum.account=a: no such key; did you mean slurm.account?",
        "slurm.acount=a: no such key; did you mean slurm.account?",
        "slurm.exclude=node1: expected a list of str, as in [a, b]",
        "kind=slrum: expected one of slurm, local, docker",
        "slurm.signal=KILL: expected one of USR1, TERM",
        "slurm.max_restarts=-1: expected at least 0",
        "slurm.options[0]=--output=x: is set by the run's folder",
        "slurm.options[1]=comment: expected --name or --name=value",
        "slurm.options[2]=--a b: expected --name or --name=value",
        "ssh.host=h: only with kind=slurm",
        "ssh.user=: needed with ssh.host",
        "ssh.job_dir=: needed with ssh.host",
        "bare.repository=here: expected an absolute path",
        "container.mounts[0]=/a: expected from:to",
    ]


@pytest.mark.parametrize("value", ["30", "24:00:00", "2-00:00:00", "1-12"])
def test_time_limits(tmp_path, value):
    assert load(tmp_path, f'slurm: {{time_limit: "{value}"}}').slurm.time_limit == value


@pytest.mark.parametrize("value", ["20", "20:00", "0:20:00", "0-0:20", "0-0:19:59"])
def test_a_time_limit_that_is_over_before_the_warning(tmp_path, value):
    (line,) = problems(tmp_path, f'slurm: {{time_limit: "{value}"}}')
    assert line.startswith("slurm.stop_lead_s=1200: must be less than slurm.time_limit=")


@pytest.mark.parametrize("value", ["21", "20:01", "0:20:01", "0-0:21", "0-1", "0-0:20:1"])
def test_a_time_limit_just_longer(tmp_path, value):
    load(tmp_path, f'slurm: {{time_limit: "{value}"}}')


def test_a_time_limit_in_words(tmp_path):
    (line,) = problems(tmp_path, "slurm: {time_limit: one day}")
    assert line.startswith("slurm.time_limit=one day: expected sbatch's form")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("env: {SERPER_API_KEY: VALUE}", "env.SERPER_API_KEY: looks like a secret"),
        ("env: {hf_token: VALUE}", "env.hf_token: looks like a secret"),
        ("SERPER_API_KEY: VALUE", "SERPER_API_KEY: looks like a secret"),
        ("slurm: {password: VALUE}", "slurm.password: looks like a secret"),
        ("secret_env: [SERPER_API_KEY=VALUE]", "secret_env[0]: expected the name of a variable"),
        ("secret_env: [MINE]\nenv: {MINE: VALUE}", "env.MINE: is in secret_env"),
        ("bare: {setup: ['export OPENAI_API_KEY=VALUE']}", "bare.setup[0]: sets OPENAI_API_KEY"),
        ("env: [VALUE", ""),
    ],
)
def test_a_secret_is_refused_and_not_shown(tmp_path, text, where):
    found = problems(tmp_path, text.replace("VALUE", SECRET))
    assert found[0].startswith(where)
    assert SECRET not in "\n".join(found)


def test_names_that_only_sound_like_secrets(tmp_path):
    env = load(tmp_path, "env: {TOKENIZERS_PARALLELISM: 'false', MAX_TOKENS: 3}").env
    assert env == {"TOKENIZERS_PARALLELISM": "false", "MAX_TOKENS": "3"}


def test_places_that_need_each_other(tmp_path):
    assert problems(tmp_path, "kind: docker") == ["container.image=: needed with kind=docker"]
    ssh = "ssh: {host: h, user: u, job_dir: /j}"
    assert problems(tmp_path, ssh) == [
        "bare.repository=: needed with ssh.host (or container.image)"
    ]
    bare = f"{ssh}\nbare: {{repository: /r}}"
    assert load(tmp_path, bare).ssh.host == "h"
    assert problems(tmp_path, f"{bare}\nsecret_env: [A]") == [
        "secret_file=: needed with secret_env and ssh.host"
    ]


def test_no_file():
    with pytest.raises(
        ConfigError, match=r"no such cluster file; copy slurm/cluster\.example\.yaml"
    ):
        load_cluster_file("/nowhere.yaml")
