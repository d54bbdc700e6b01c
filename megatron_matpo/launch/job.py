"""What is submitted: a pure function of recipe, cluster file and command.

Both ways of submitting, our own batch script (`launch/sbatch.py`) and NeMo-Run's executors
(`launch/executors.py`), say what one `Job` says.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_matpo.config.cluster_file import ClusterFile, ContainerSection
from megatron_matpo.config.root import Config
from megatron_matpo.config.validate import Command
from megatron_matpo.errors import ConfigError

_TASK_MODULE = "megatron_matpo.launch.slurm_task"


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    command: Command
    recipe: str
    overrides: tuple[str, ...]
    model: str = ""
    """What `matpo eval` evaluates."""

    @property
    def words(self) -> tuple[str, ...]:
        """The arguments of `matpo`."""
        model = ("--model", self.model) if self.command == "eval" else ()
        return (self.command, self.recipe, *model, *self.overrides)


@dataclass(frozen=True)
class Job:
    """One job: a task per node, each the same command."""

    name: str
    nodes: int
    gpus_per_node: int
    options: tuple[tuple[str, str], ...]
    """Options of sbatch, long names without dashes; empty text: a flag."""
    folder: str
    """Where the batch script works; empty: where it was submitted."""
    workdir: str
    """Where the tasks work; empty: in `folder`."""
    run_dir: str
    """The run's folder as the batch script sees it, absolute or below `folder`."""
    task_run_dir: str
    """The same as the tasks see it."""
    python: str
    command: Command
    words: tuple[str, ...]
    """What `matpo` is asked to do, as `train RECIPE key=value`."""
    preflight: bool
    container: ContainerSection | None
    environment: tuple[tuple[str, str], ...]
    secret_names: tuple[str, ...]
    secret_file: str
    setup: tuple[str, ...]
    exclude: tuple[str, ...]
    max_restarts: int
    stop_lead_s: int
    """How long before its time limit the job is warned."""

    @property
    def task(self) -> tuple[str, ...]:
        """The command of every task under Slurm; `--run-dir FOLDER` and `words` follow."""
        preflight = ("--preflight",) if self.preflight else ()
        return (self.python, "-m", _TASK_MODULE, *preflight)


def cluster_overrides(cluster: ClusterFile) -> tuple[str, ...]:
    """What the cluster file says of a recipe's settings; the user's own overrides come later."""
    found: list[str] = []
    if cluster.run_dir:
        found.append(f"run.dir={cluster.run_dir}")
    if cluster.interface:
        found.append(f"cluster.interface={cluster.interface}")
    if cluster.kind == "slurm":
        found += ["run.save_on_stop=true", f"run.save_timeout_s={cluster.slurm.stop_lead_s}"]
    return tuple(found)


def describe_job(config: Config, cluster: ClusterFile, request: Request) -> Job:
    """The job of a checked recipe on a checked cluster.

    `request` has all overrides that `config` was read with, the cluster file's included.

    Raises:
        ConfigError: in a container, and the run's folder is on none of its mounts.
    """
    container = cluster.container if cluster.container.image else None
    run_dir = posixpath.normpath(config.run_dir)
    return Job(
        name=f"matpo-{config.run.name}",
        nodes=config.cluster.num_nodes,
        gpus_per_node=config.cluster.gpus_per_node,
        options=_sbatch_options(config, cluster),
        folder=cluster.bare.repository,
        workdir=container.workdir if container else cluster.bare.repository,
        run_dir=_outside(run_dir, container) if container else run_dir,
        task_run_dir=run_dir,
        python=container.python if container else cluster.bare.python,
        command=request.command,
        words=request.words,
        preflight=cluster.preflight,
        container=container,
        environment=_environment(cluster),
        secret_names=tuple(cluster.secret_env),
        secret_file=cluster.secret_file,
        setup=tuple(cluster.bare.setup),
        exclude=tuple(cluster.slurm.exclude),
        max_restarts=cluster.slurm.max_restarts,
        stop_lead_s=cluster.slurm.stop_lead_s,
    )


def _sbatch_options(config: Config, cluster: ClusterFile) -> tuple[tuple[str, str], ...]:
    slurm = cluster.slurm
    gpus = config.cluster.gpus_per_node
    typed = f"{slurm.gpu_type}:{gpus}" if slurm.gpu_type else str(gpus)
    found: list[tuple[str, str]] = [
        ("job-name", f"matpo-{config.run.name}"),
        ("nodes", str(config.cluster.num_nodes)),
        ("ntasks-per-node", "1"),
    ]
    if gpus and slurm.gpu_request == "gres":
        found.append(("gres", f"gpu:{typed}"))
    if gpus and slurm.gpu_request == "gpus-per-node":
        found.append(("gpus-per-node", typed))
    found += [
        (name, value)
        for name, value in (
            ("cpus-per-task", str(slurm.cpus_per_task) if slurm.cpus_per_task else ""),
            ("mem", slurm.memory),
            ("time", slurm.time_limit),
            ("account", slurm.account),
            ("partition", slurm.partition),
            ("qos", slurm.qos),
            ("reservation", slurm.reservation),
            ("constraint", slurm.constraint),
            ("exclude", ",".join(slurm.exclude)),
            ("mail-user", slurm.mail_user),
            ("mail-type", slurm.mail_type if slurm.mail_user else ""),
        )
        if value
    ]
    if slurm.exclusive:
        found.append(("exclusive", ""))
    # Without "B:" the signal goes to the tasks, not to the batch script.
    found += [
        ("signal", f"{slurm.signal}@{slurm.stop_lead_s}"),
        ("requeue", ""),
        ("open-mode", "append"),
    ]
    for option in slurm.options:
        name, _, value = option.removeprefix("--").partition("=")
        found.append((name, value))
    return tuple(found)


def _environment(cluster: ClusterFile) -> tuple[tuple[str, str], ...]:
    """Variables of every process; what the cluster file says wins."""
    network = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if cluster.interface else ()
    own = {"PYTHONUNBUFFERED": "1", **dict.fromkeys(network, cluster.interface)}
    return tuple({**own, **cluster.env}.items())


def _outside(run_dir: str, container: ContainerSection) -> str:
    """The path outside of the container of the run's folder inside."""
    inside = posixpath.join(container.workdir, run_dir)
    for mount in container.mounts:
        source, target = _mount_parts(mount)
        if inside == target or inside.startswith(target.rstrip("/") + "/"):
            return posixpath.normpath(source + inside.removeprefix(target.rstrip("/")))
    raise ConfigError(
        f"container.mounts={list(container.mounts)}: none holds the run's folder {inside}, which "
        "would be lost with the container; mount a folder of the shared file system, as "
        "/shared/me/runs:/runs, and set run_dir: /runs in the cluster file"
    )


def _mount_parts(mount: str) -> Sequence[str]:
    """Source and target of `from:to` or `from:to:flags`."""
    parts = mount.split(":")
    return parts[0], posixpath.normpath(parts[1])
