"""The cluster file of `matpo launch`: where a run goes and what that place needs.

One YAML file per cluster, for all recipes; `slurm/cluster.example.yaml` is the commented one. Read
as recipes are (`config/load.py`): every mistake at once, with its path and what was probably meant.

No value of it may be a secret, because values are written into batch scripts: `secret_env` names
variables whose values come from the submitting shell or from `secret_file` on the cluster.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_matpo.config.load import format_problems
from megatron_matpo.config.schema import check_mapping
from megatron_matpo.errors import ConfigError

KINDS = ("slurm", "local", "docker")
SIGNALS = ("USR1", "TERM")
GPU_REQUESTS = ("gres", "gpus-per-node", "none")


@dataclass(frozen=True)
class SlurmSection:
    """How to ask Slurm for nodes. Empty text and 0 leave an option to the site's default."""

    account: str = ""
    partition: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    time_limit: str = ""
    """As sbatch takes it: `minutes`, `hours:minutes:seconds`, `days-hours`, ..."""
    exclude: list[str] = field(default_factory=list[str])
    """Nodes never to be used, as `node007` or `node[010-012]`."""
    exclusive: bool = True
    """Whole nodes, nobody else on them."""
    memory: str = "0"
    """Of a node, as sbatch's --mem; 0: all of it."""
    cpus_per_task: int = 0
    """A task is the whole node here."""
    gpu_request: str = "gres"
    """`gres | gpus-per-node | none`: how this site wants GPUs asked for."""
    gpu_type: str = ""
    """As in `gres/gpu:a800`; empty: any."""
    mail_user: str = ""
    mail_type: str = "FAIL,REQUEUE,END"
    max_restarts: int = 5
    """Restarts in a row without a newer checkpoint before the job gives up; stops that saved do not
    count."""
    signal: str = "USR1"
    """`USR1 | TERM`: what the run gets before the time limit. USR1 always saves, TERM with
    `run.save_on_stop`."""
    stop_lead_s: int = 1200
    """How long before the time limit: enough for an update and a checkpoint, which `matpo simulate`
    reckons (the 14B recipes on 16 nodes of 8 A800: 15 minutes)."""
    options: list[str] = field(default_factory=list[str])
    """Further options of sbatch, as `--comment=matpo`."""


@dataclass(frozen=True)
class ContainerSection:
    """The image that everything runs in; none: the bare environment."""

    image: str = ""
    """Pyxis: `registry#name:tag` or a `.sqsh` file; docker: `name:tag`."""
    mounts: list[str] = field(default_factory=list[str])
    """`from:to` each; the run folder's file system must be among them."""
    workdir: str = "/opt/megatron_matpo"
    """Where recipes and `runs/` are inside the image."""
    python: str = "/opt/trainer/bin/python"
    """The interpreter that has megatron_matpo, inside the image."""
    shm_size: str = "64g"
    """docker only."""


@dataclass(frozen=True)
class BareSection:
    """A checkout and its environments on the shared file system."""

    repository: str = ""
    """Absolute path on the cluster; empty: where the job is submitted."""
    python: str = ".venv/bin/python"
    """The interpreter that has megatron_matpo, relative to the repository or absolute."""
    setup: list[str] = field(default_factory=list[str])
    """Shell lines before anything else runs, as `module load cuda/13.0`."""


@dataclass(frozen=True)
class SshSection:
    """A login node that is reached through SSH; no host: submit on this machine."""

    host: str = ""
    user: str = ""
    port: int = 22
    identity: str = ""
    """Private key; empty: the agent's, or a password."""
    job_dir: str = ""
    """Absolute folder on the cluster for NeMo-Run's scripts."""


@dataclass(frozen=True)
class ClusterFile:
    """A whole cluster file."""

    kind: str = "slurm"
    """`slurm | local | docker`"""
    interface: str = ""
    """Network interface between the nodes, as `ib0`; also NCCL's and gloo's."""
    run_dir: str = ""
    """Where runs are kept on this cluster (the recipe's `run.dir`), on the shared file system."""
    env: dict[str, str] = field(default_factory=dict[str, str])
    """Variables of every process. No secrets."""
    secret_env: list[str] = field(default_factory=list[str])
    """Names of variables with secrets."""
    secret_file: str = ""
    """On the cluster, mode 0600, lines `NAME=value`: variables that are not set where the job is
    submitted."""
    preflight: bool = True
    """Run `matpo doctor` on every node before the run; a node that fails is left out next time."""
    slurm: SlurmSection = field(default_factory=SlurmSection)
    container: ContainerSection = field(default_factory=ContainerSection)
    bare: BareSection = field(default_factory=BareSection)
    ssh: SshSection = field(default_factory=SshSection)


_SECRET_NAME = re.compile(
    r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE
)
_ASSIGNMENT = re.compile(r"\b([A-Za-z_][A-Za-z0-9_]*)=")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
# Options that the generated script sets itself, by another setting.
_OWN_OPTIONS = {
    "--job-name": "the run's name",
    "--nodes": "cluster.num_nodes of the recipe",
    "--ntasks-per-node": "always 1",
    "--ntasks": "always 1 per node",
    "--output": "the run's folder",
    "--open-mode": "always append",
    "--requeue": "always",
    "--no-requeue": "slurm.max_restarts=0",
    "--signal": "slurm.signal and slurm.stop_lead_s",
}


def load_cluster_file(path: str) -> ClusterFile:
    """Read and check a cluster file.

    Raises:
        ConfigError: with one line for every violation; values that may be secrets are not shown.
    """
    cluster, problems = collect_cluster_file(path)
    if problems:
        raise ConfigError(format_problems(problems))
    return cluster


def collect_cluster_file(path: str) -> tuple[ClusterFile, list[str]]:
    """Like `load_cluster_file`, but returns the violations; values with one are at their defaults.

    Raises:
        ConfigError: the file cannot be read at all.
    """
    raw, problems = _without_secrets(_read(path))
    problems += _check_time(raw)
    clean, wrong = check_mapping(ClusterFile, raw, "", ClusterFile)
    problems += wrong
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ClusterFile), clean)
        cluster = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        problems.append(str(error).splitlines()[0])
        raise ConfigError(format_problems([f"{line} (in {path})" for line in problems])) from error
    assert isinstance(cluster, ClusterFile), "the schema is a ClusterFile"
    problems += _violations(cluster)
    return cluster, [f"{line} (in {path})" for line in problems]


def _read(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such cluster file; copy slurm/cluster.example.yaml")
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        # The text of a parser's error shows the line, which may hold anything.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}: not valid YAML{where} ({type(error).__name__})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of settings")
    return {str(key): value for key, value in cast("dict[Any, Any]", raw).items()}


def _without_secrets(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`raw` without keys that look like secrets, which no later message may show."""
    problems: list[str] = []

    def kept(mapping: dict[Any, Any], path: str) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for key, value in mapping.items():
            where = f"{path}.{key}" if path else str(key)
            if where not in ("secret_env", "secret_file") and _SECRET_NAME.search(str(key)):
                problems.append(
                    f"{where}: looks like a secret, and values of this file are written into batch "
                    f"scripts; name it in secret_env instead, as secret_env: [{key}]"
                )
            else:
                is_mapping = isinstance(value, dict)
                result[key] = kept(cast("dict[Any, Any]", value), where) if is_mapping else value
        return result

    return kept(raw, ""), problems


def _violations(cluster: ClusterFile) -> list[str]:
    problems: list[str] = []
    for path, value, allowed in (
        ("kind", cluster.kind, KINDS),
        ("slurm.signal", cluster.slurm.signal, SIGNALS),
        ("slurm.gpu_request", cluster.slurm.gpu_request, GPU_REQUESTS),
    ):
        if value not in allowed:
            problems.append(f"{path}={value}: expected one of {', '.join(allowed)}")
    problems += [*_check_slurm(cluster.slurm), *_check_variables(cluster)]
    problems += [*_check_places(cluster), *_check_lines(cluster)]
    return problems


def _check_time(raw: dict[str, Any]) -> list[str]:
    """YAML takes 24:00:00 for the number 86400, which sbatch would take for minutes."""
    slurm: Any = raw.get("slurm")
    value: Any = cast("dict[Any, Any]", slurm).get("time_limit") if isinstance(slurm, dict) else ""
    if isinstance(value, int):
        return [f'slurm.time_limit={value}: write it in quotes, as "24:00:00"']
    return []


def _check_slurm(slurm: SlurmSection) -> list[str]:
    problems: list[str] = []
    if slurm.time_limit and not _TIME.fullmatch(slurm.time_limit):
        problems.append(
            f'slurm.time_limit={slurm.time_limit}: expected sbatch\'s form, as "24:00:00" or '
            '"2-00:00:00"'
        )
    elif slurm.time_limit and _seconds(slurm.time_limit) <= slurm.stop_lead_s:
        problems.append(
            f"slurm.stop_lead_s={slurm.stop_lead_s}: must be less than slurm.time_limit="
            f"{slurm.time_limit}, or the run is stopped at its start"
        )
    for path, value, least in (
        ("slurm.max_restarts", slurm.max_restarts, 0),
        ("slurm.stop_lead_s", slurm.stop_lead_s, 1),
        ("slurm.cpus_per_task", slurm.cpus_per_task, 0),
    ):
        if value < least:
            problems.append(f"{path}={value}: expected at least {least}")
    for index, option in enumerate(slurm.options):
        name = option.split("=", 1)[0]
        if not option.startswith("--") or any(char.isspace() for char in option):
            problems.append(f"slurm.options[{index}]={option}: expected --name or --name=value")
        elif name in _OWN_OPTIONS:
            problems.append(f"slurm.options[{index}]={option}: is set by {_OWN_OPTIONS[name]}")
    return problems


def _seconds(time_limit: str) -> int:
    """Sbatch's minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, rest = time_limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_variables(cluster: ClusterFile) -> list[str]:
    problems = [
        f"env.{name}: expected a variable's name" for name in cluster.env if not _is_name(name)
    ]
    for index, name in enumerate(cluster.secret_env):
        # What is wrong may be the secret itself, so it is not shown.
        if not _is_name(name):
            problems.append(f"secret_env[{index}]: expected the name of a variable, not its value")
        elif name in cluster.env:
            problems.append(f"env.{name}: is in secret_env, so it must not have a value here")
    return problems


def _check_places(cluster: ClusterFile) -> list[str]:
    problems: list[str] = []
    ssh = cluster.ssh.host
    if ssh:
        if cluster.kind != "slurm":
            problems.append(f"ssh.host={ssh}: only with kind=slurm")
        for path, value in (("ssh.user", cluster.ssh.user), ("ssh.job_dir", cluster.ssh.job_dir)):
            if not value:
                problems.append(f"{path}=: needed with ssh.host")
        if not cluster.container.image and not cluster.bare.repository:
            problems.append("bare.repository=: needed with ssh.host (or container.image)")
    if cluster.secret_env and not cluster.secret_file and (ssh or cluster.kind == "docker"):
        where = "ssh.host" if ssh else "kind=docker"
        problems.append(f"secret_file=: needed with secret_env and {where}")
    for path, value in (
        ("bare.repository", cluster.bare.repository),
        ("ssh.job_dir", cluster.ssh.job_dir),
        ("container.workdir", cluster.container.workdir),
    ):
        if value and not value.startswith("/"):
            problems.append(f"{path}={value}: expected an absolute path")
    if cluster.kind == "docker" and not cluster.container.image:
        problems.append("container.image=: needed with kind=docker")
    for index, mount in enumerate(cluster.container.mounts):
        if ":" not in mount or "," in mount:
            problems.append(f"container.mounts[{index}]={mount}: expected from:to")
    return problems


def _check_lines(cluster: ClusterFile) -> list[str]:
    problems: list[str] = []
    for index, line in enumerate(cluster.bare.setup):
        for name in _ASSIGNMENT.findall(line):
            if _SECRET_NAME.search(name) or name in cluster.secret_env:
                problems.append(
                    f"bare.setup[{index}]: sets {name}, which looks like a secret; name it in "
                    "secret_env instead"
                )
    return problems


def _is_name(text: str) -> bool:
    return _VARIABLE.fullmatch(text) is not None
