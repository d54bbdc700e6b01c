"""The batch script of a job, for `sbatch`, and the part of it that NeMo-Run's scripts share.

Nothing here reads a file of the cluster or starts anything: text from a `Job`. Static shell code is
in `launch/batch.sh` and `launch/secrets.sh`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from megatron_matpo.launch.job import Job

_BATCH = Path(__file__).with_name("batch.sh")
_SECRETS = Path(__file__).with_name("secrets.sh")
_HEADER = """\
#!/bin/bash
# {summary}
# Written by: {origin}
# Submit:     sbatch {options}{file} [key=value ...]
# The same again resumes the run. Output: {log}"""
# What a path inside of the container is outside, only the cluster file says.
_NO_RUN_DIR = "echo 'matpo: set run_dir in the cluster file, and write this file anew' >&2; exit 2"
_FROM_SUBMISSION = "${SLURM_SUBMIT_DIR:?submit this file with sbatch}"


def sbatch_text(job: Job, origin: str, file: str) -> str:
    """A script that stands alone; it takes further overrides as arguments.

    Args:
        job: what to run.
        origin: the command that writes this text.
        file: its path, as in the command that submits it.
    """
    nodes = f"{job.nodes} node{'s' * (job.nodes > 1)}"
    gpus = f" of {job.gpus_per_node} GPUs" if job.gpus_per_node else ""
    missing = [name for name in ("account", "partition") if name not in dict(job.options)]
    header = _HEADER.format(
        summary=f"matpo {job.words[0]} {job.words[1]} on {nodes}{gpus}.",
        origin=origin,
        options="".join(f"[--{name}=NAME] " for name in missing),
        file=file,
        log=f"{job.run_dir}/logs/slurm-JOB.log",
    )
    lines = [
        header,
        *(_flag(name, value) for name, value in job.options),
        "#SBATCH --output=%x-%j.out",
        "",
        *_run_dir_of_arguments(job),
        preamble(job),
        f"{quoted(['srun', *_srun_options(job)])} \\",
        f'    {quoted(job.task)} --run-dir "$matpo_task_run" \\',
        f'    {quoted(job.words)} "$@"',
    ]
    return "\n".join(lines) + "\n"


def preamble(job: Job) -> str:
    """Everything before `srun`: variables, the shell functions, environment, secrets."""
    lines = [
        f"matpo_max_restarts={job.max_restarts}",
        f"matpo_stop_lead={job.stop_lead_s}",
        f"matpo_exclude={shlex.quote(','.join(job.exclude))}",
        "",
        _BATCH.read_text(encoding="utf-8").rstrip(),
        "",
        f"cd {shlex.quote(job.folder) if job.folder else _submitted()} || exit 2",
        "matpo_start",
        *environment_lines(job),
        *secret_lines(job),
    ]
    return "\n".join(lines)


def environment_lines(job: Job) -> list[str]:
    """The site's own lines and the variables of every process."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in job.environment]
    return [*(f"{{ {line}; }} || exit 1" for line in job.setup), *exports]


def secret_lines(job: Job) -> list[str]:
    """Reads the variables with secrets where the job runs; none is in any script."""
    if not job.secret_names:
        return []
    # A leading ~ is the home of who runs the job.
    file = job.secret_file
    where = f'"$HOME"/{shlex.quote(file[2:])}' if file.startswith("~/") else shlex.quote(file)
    function = _SECRETS.read_text(encoding="utf-8").rstrip()
    return [function, f"matpo_read_secrets {where} {quoted(job.secret_names)}"]


# One task that ends with an error ends all; one that is done early waits for the others, however
# long the first node still writes.
STEP_OPTIONS = ("--kill-on-bad-exit=1", "--wait=0")


def container_variables(job: Job) -> list[str]:
    """Variables that the job sets even if the image sets them too (Pyxis: `--container-env`)."""
    return [*(name for name, _ in job.environment), *job.secret_names]


def _srun_options(job: Job) -> list[str]:
    found: list[str] = [*STEP_OPTIONS]
    container = job.container
    if container is not None:
        found += [f"--container-image={container.image}", f"--container-workdir={job.workdir}"]
        if container.mounts:
            found.append(f"--container-mounts={','.join(container.mounts)}")
        found.append(f"--container-env={','.join(container_variables(job))}")
    return found


def quoted(words: Iterable[str]) -> str:
    """As the words of one shell command."""
    return " ".join(shlex.quote(word) for word in words)


def _submitted() -> str:
    return f'"{_FROM_SUBMISSION}"'


def _run_dir_of_arguments(job: Job) -> list[str]:
    """`run.name=` and `run.dir=` among the arguments change where the run's folder is."""
    parent, _, name = job.run_dir.rpartition("/")
    seen = job.task_run_dir.rpartition("/")[0]
    task_dir = [f"matpo_task_dir={shlex.quote(seen)}"] if job.container else []
    lines = [
        f"matpo_dir={shlex.quote(parent)}",
        *task_dir,
        f"matpo_name={shlex.quote(name)}",
        'for word in "$@"; do',
        '    case "$word" in',
        "        run.name=*) matpo_name=${word#*=} ;;",
        f"        run.dir=*) {_NO_RUN_DIR if job.container else 'matpo_dir=${word#*=}'} ;;",
        "    esac",
        "done",
        'matpo_run="$matpo_dir/$matpo_name"',
        f'matpo_task_run="${"matpo_task_dir" if job.container else "matpo_dir"}/$matpo_name"',
    ]
    return lines


def _flag(name: str, value: str) -> str:
    return f"#SBATCH --{name}" + (f"={value}" if value else "")
