"""A job through NeMo-Run: Slurm (here or through SSH), this machine, or docker.

NeMo-Run makes its own batch script. Ours takes part in it where it can: `setup_lines` hold the same
preamble as the script of `launch/sbatch.py`, whose trap at the end decides about requeueing
(NeMo-Run's own retries stay at 0, they know no exit codes); options of sbatch are its
`additional_parameters`.
`nemo_run` is imported inside functions: only `matpo launch` needs it.
"""

from __future__ import annotations

import logging
import os
import posixpath
import shlex
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_matpo.config.cluster_file import ClusterFile
from megatron_matpo.errors import ConfigError, MatpoError
from megatron_matpo.launch.job import Job
from megatron_matpo.launch.sbatch import (
    STEP_OPTIONS,
    container_variables,
    environment_lines,
    preamble,
    quoted,
    secret_lines,
)

_TASK = "task"
# NeMo-Run prints every line that it runs, values of variables included.
_QUIET = "{ set +vx; } 2>/dev/null"
# NeMo-Run's script sets it; srun then gives tasks a terminal, and logs fill with what is rewritten.
_NO_TERMINAL = "unset SLURM_UNBUFFEREDIO"
_INSTALL = (
    "pip install -r requirements/launch.txt, then "
    "pip install --no-deps -r requirements/launch-nodeps.txt"
)


@dataclass(frozen=True)
class Submission:
    """What became of a job."""

    job_id: str
    """Slurm's; empty for others."""
    experiment_dir: str
    succeeded: bool = True
    """Of a job that was waited for."""


def batch_script(job: Job, cluster: ClusterFile) -> str:
    """What would be submitted to Slurm, word for word. Writes nothing that stays."""
    with _experiment(job, cluster) as experiment:
        try:
            experiment.dryrun(log=False, exist_ok=True, delete_exp_dir=False)
            return (Path(experiment._exp_dir) / f"{_TASK}_sbatch.sh").read_text(encoding="utf-8")
        finally:
            shutil.rmtree(experiment._exp_dir, ignore_errors=True)


def submit(job: Job, cluster: ClusterFile) -> Submission:
    """Submit to Slurm and return at once; elsewhere run to the end.

    Raises:
        MatpoError: it could not be submitted.
    """
    with _experiment(job, cluster) as experiment:
        folder = str(experiment._exp_dir)
        try:
            experiment.run(detach=cluster.kind == "slurm", tail_logs=cluster.kind != "slurm")
        except Exception as error:
            # NeMo-Run raises whatever its libraries raise; the last line has the command's answer.
            what = str(error).strip().splitlines() or [type(error).__name__]
            raise MatpoError(f"the job was not submitted: {what[-1]} (files: {folder})") from error
        handle = experiment.jobs[0].handle
    if cluster.kind == "slurm":
        return Submission(handle.rstrip("/").rsplit("/", 1)[-1], folder)
    return Submission("", folder, succeeded=experiment.jobs[0].state.name == "SUCCEEDED")


def slurm_executor(job: Job, cluster: ClusterFile) -> Any:
    """NeMo-Run's description of the job for Slurm."""
    run = _nemo_run()
    own = ("job-name", "nodes", "ntasks-per-node")
    options: dict[str, Any] = {
        name.replace("-", "_"): value or True for name, value in job.options if name not in own
    }
    ssh = cluster.ssh
    tunnel = (
        run.SSHTunnel(
            host=ssh.host,
            user=ssh.user,
            port=ssh.port,
            identity=os.path.expanduser(ssh.identity) or None,
            job_dir=ssh.job_dir,
        )
        if ssh.host
        else run.LocalTunnel(job_dir="")
    )
    log = posixpath.join(job.folder or os.getcwd(), job.run_dir, "logs/slurm-%j.log")
    executor = run.SlurmExecutor(
        account=options.pop("account", None),
        partition=options.pop("partition", None),
        time=options.pop("time", None),
        nodes=job.nodes,
        ntasks_per_node=1,
        tunnel=tunnel,
        packager=run.Packager(),
        additional_parameters=options,
        setup_lines="\n".join(
            [_QUIET, _NO_TERMINAL, f"matpo_run={shlex.quote(job.run_dir)}", preamble(job).rstrip()]
        ),
        srun_args=[*STEP_OPTIONS, f"--output={log}", "--open-mode=append"],
        container_image=job.container.image if job.container else None,
        container_mounts=list(job.container.mounts) if job.container else [],
        container_env=container_variables(job),
        poll_estimated_start_time=False,
        # Without one NeMo-Run makes it of the account, which a site may not have.
        job_name_prefix="matpo-",
    )
    executor.job_details.job_name = job.name
    return executor


def docker_executor(job: Job, cluster: ClusterFile) -> Any:
    """NeMo-Run's description of the job for docker on one machine."""
    run = _nemo_run()
    container = cluster.container
    volumes = list(container.mounts)
    if job.secret_file:
        file = os.path.expanduser(job.secret_file)
        volumes.append(f"{file}:{file}:ro")
    return run.DockerExecutor(
        container_image=container.image,
        num_gpus=-1 if job.gpus_per_node else None,
        shm_size=container.shm_size,
        # Files of the run belong to who started it, who has no home in the image.
        additional_kwargs={"entrypoint": "/usr/bin/env", "user": f"{os.getuid()}:{os.getgid()}"},
        env_vars={"HOME": "/tmp"},
        ipc_mode="host",
        network="host",
        # NCCL pins host memory; its kernels need deep stacks.
        ulimits=["memlock:-1", "stack:67108864"],
        volumes=volumes,
        packager=run.Packager(),
    )


def task_script(job: Job, cluster: ClusterFile) -> str:
    """What runs on a node: NeMo-Run puts it into a file and runs it with bash."""
    folder = job.workdir or (os.getcwd() if not cluster.ssh.host else "")
    lines = [f"cd {shlex.quote(folder)} || exit 2"]
    if cluster.kind == "slurm":
        run_dir = ("--run-dir", job.task_run_dir)
        return "\n".join([*lines, f"exec {quoted([*job.task, *run_dir, *job.words])}", ""])
    lines += [*environment_lines(job), *secret_lines(job)]
    return "\n".join(
        [*lines, f"exec {quoted([job.python, '-m', 'megatron_matpo', *job.words])}", ""]
    )


def _experiment(job: Job, cluster: ClusterFile) -> Any:
    """An experiment with the job as its only task; used as a context manager."""
    run = _nemo_run()
    executor: Any
    if cluster.kind == "slurm":
        executor = slurm_executor(job, cluster)
    elif cluster.kind == "docker":
        executor = docker_executor(job, cluster)
    else:
        executor = run.LocalExecutor()
    experiment = run.Experiment(
        job.name,
        id=f"{job.name}_{time.time_ns()}",
        log_level="WARN",
        enable_goodbye_message=False,
        skip_status_at_exit=True,
        serialize_metadata_for_scripts=False,
        clean_mode=True,
    )
    experiment.__enter__()
    experiment.add(run.Script(inline=task_script(job, cluster)), executor=executor, name=_TASK)
    return experiment


def _nemo_run() -> Any:
    logging.getLogger("torchx").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Of packages that it imports for clouds.
            warnings.simplefilter("ignore")
            import nemo_run
    except ImportError as error:
        raise ConfigError(
            f"matpo launch needs NeMo-Run ({error}): {_INSTALL}; without it, --write FILE makes a "
            "script for sbatch"
        ) from error
    return nemo_run
