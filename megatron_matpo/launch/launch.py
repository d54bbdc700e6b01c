"""`matpo launch`: a recipe on a cluster, checked and shown before anything is submitted."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_matpo.config.cluster_file import ClusterFile, collect_cluster_file
from megatron_matpo.config.load import collect_recipe, dump_config, format_problems
from megatron_matpo.config.reward import JUDGE
from megatron_matpo.config.root import Config
from megatron_matpo.config.validate import Command, check_anywhere, check_values, collect_warnings
from megatron_matpo.errors import ConfigError
from megatron_matpo.launch.eval import EvalRequest
from megatron_matpo.launch.executors import Submission, batch_script, submit, task_script
from megatron_matpo.launch.job import Job, Request, cluster_overrides, describe_job
from megatron_matpo.launch.node_plan import node_plan_text
from megatron_matpo.launch.preflight import check_recipe
from megatron_matpo.launch.sbatch import sbatch_text
from megatron_matpo.launch.slurm_state import note_submission, queued_job

# A shorter value is no secret, and would be found everywhere.
_MIN_SECRET_CHARS = 6


@dataclass(frozen=True)
class LaunchRequest:
    """The command line."""

    recipe: str
    cluster: str
    command: Command | None = None
    """None: what the recipe has data for."""
    model: str = ""
    """What an evaluation evaluates."""
    dry_run: bool = False
    write: str = ""
    """File for the batch script, instead of submitting."""
    overrides: list[str] = field(default_factory=list)


def launch(request: LaunchRequest) -> int:
    """Show, write or submit; returns the exit code.

    Raises:
        ConfigError: recipe or cluster file are wrong, or do not fit; nothing was submitted.
        MatpoError: the job could not be submitted.
    """
    config, cluster, job = prepare(request)
    warnings = collect_warnings(config, command=job.command)
    for warning in [*warnings, *_keys_nobody_sets(config, cluster, job)]:
        print(f"warning: {warning}", file=sys.stderr)
    if request.write or request.dry_run:
        for problem in [*check_anywhere(config, job.command), *_lacks_weights(config, job)]:
            print(f"warning: a run refuses this recipe: {problem}", file=sys.stderr)
    if request.write:
        return _write(request, job)
    if request.dry_run:
        print(_dry_run(request, config, cluster, job), end="")
        return 0
    _check_submission(request, config, cluster, job)
    _without_secrets(sbatch_text(job, "", "") + task_script(job, cluster), job)
    submission = submit(job, cluster)
    if submission.job_id and not cluster.ssh.host:
        # What cannot be written here is the cluster's own, and is there when the job starts.
        with contextlib.suppress(OSError):
            run_dir = Path(job.folder or ".") / job.run_dir
            note_submission(run_dir, submission.job_id, job.max_restarts)
    print(_next_steps(config, cluster, job, submission))
    return 0 if submission.succeeded else 1


def prepare(request: LaunchRequest) -> tuple[Config, ClusterFile, Job]:
    """Read and check recipe and cluster file together.

    Raises:
        ConfigError: one line for every violation in either of them.
    """
    cluster, problems = collect_cluster_file(request.cluster)
    overrides = (*cluster_overrides(cluster), *request.overrides)
    config, wrong = collect_recipe(request.recipe, _as_run(request, overrides))
    command = request.command or ("eval" if request.model else config.command)
    problems += [*wrong, *check_values(config), *_misfits(config, cluster, request, command)]
    if problems:
        raise ConfigError(format_problems(problems))
    wanted = Request(command, request.recipe, overrides, request.model)
    return config, cluster, describe_job(config, cluster, wanted)


def _as_run(request: LaunchRequest, overrides: Sequence[str]) -> list[str]:
    """Overrides as the command on the cluster reads them, its options included."""
    if not request.model:
        return list(overrides)
    return EvalRequest(request.recipe, request.model, [], overrides=list(overrides)).all_overrides()


def _misfits(
    config: Config, cluster: ClusterFile, request: LaunchRequest, command: Command
) -> list[str]:
    """What is right in recipe and cluster file each, but not together."""
    found: list[str] = []
    nodes = config.cluster.num_nodes
    if nodes > 1 and cluster.kind != "slurm":
        found.append(f"cluster.num_nodes={nodes}: kind={cluster.kind} is one node")
    if (command == "eval") != bool(request.model):
        found.append("--model FOLDER: needed for an evaluation, and only there")
    if request.write and cluster.kind != "slurm":
        found.append(f"--write: kind={cluster.kind} has no batch script")
    if (cluster.ssh.host or cluster.container.image) and os.path.isabs(request.recipe):
        found.append(
            f"{request.recipe}: name the recipe as seen from the repository, as recipes/NAME.yaml: "
            "the job reads it where it runs"
        )
    return found


def _check_submission(
    request: LaunchRequest, config: Config, cluster: ClusterFile, job: Job
) -> None:
    """What can still be found before a place in the queue is taken."""
    problems = [*check_anywhere(config, job.command), *_lacks_weights(config, job)]
    if cluster.kind != "docker" and not cluster.ssh.host and not job.secret_file:
        problems += [
            f"secret_env: {name} is not set here, and there is no secret_file"
            for name in job.secret_names
            if not os.environ.get(name)
        ]
    is_bare_here = cluster.kind != "docker" and not cluster.ssh.host and job.container is None
    if is_bare_here and not (Path(job.folder or ".") / job.python).is_file():
        problems.append(
            f"bare.python={job.python}: no such file in {job.folder or Path.cwd()}; `make setup` "
            "makes it there"
        )
    if not cluster.ssh.host and (other := queued_job(Path(job.folder or ".") / job.run_dir)):
        problems.append(
            f"run.name={config.run.name}: {other}, is a job of this run; cancel it, or choose "
            "another name"
        )
    if problems:
        raise ConfigError(format_problems(problems))
    is_here = is_bare_here and not job.folder
    if is_here and config.cluster.num_nodes == 1 and not config.cluster.gpus_per_node:
        # The nodes see what this machine sees. GPUs and their driver they have themselves.
        overrides = [*cluster_overrides(cluster), *request.overrides]
        check_recipe(request.recipe, _as_run(request, overrides), job.command)


def _keys_nobody_sets(config: Config, cluster: ClusterFile, job: Job) -> list[str]:
    """Variables with keys that the recipe names and, as far as can be seen, no job will have.

    Lines of `bare.setup` or the image may set them, so this is no mistake for sure.
    """
    wanted: dict[str, str] = {}
    for name, server in config.tools.servers.items():
        path = f"tools.servers.{name}"
        wanted |= dict.fromkeys(server.env_from, f"{path}.env_from")
        wanted |= dict.fromkeys(server.headers_from.values(), f"{path}.headers_from")
    if config.reward.grader == JUDGE and config.reward.judge.api_key_env:
        wanted[config.reward.judge.api_key_env] = "reward.judge.api_key_env"
    named = {*job.secret_names, *dict(job.environment)}
    # Through SSH or into a container of docker's the shell's variables do not come along.
    is_inherited = cluster.kind != "docker" and not cluster.ssh.host
    return [
        f"{where}={name}: the job will not have this variable; name it in secret_env of the "
        "cluster file, and put its value into secret_file"
        for name, where in wanted.items()
        if job.command != "sft" and name not in named
        if not (is_inherited and os.environ.get(name))
    ]


def _lacks_weights(config: Config, job: Job) -> list[str]:
    """A folder of the repository with a model's shape only, which is what most recipes name."""
    folder = Path(job.folder or ".") / config.model.path
    is_own = not os.path.isabs(config.model.path) and (folder / "config.json").is_file()
    is_random = job.command == "sft" and config.model.random_init
    if not is_own or is_random or any(folder.glob("*.safetensors")):
        return []
    return [
        f"model.path={config.model.path}: has no *.safetensors, only the model's shape; add "
        "model.path=FOLDER with weights, as the job sees it"
    ]


def _dry_run(request: LaunchRequest, config: Config, cluster: ClusterFile, job: Job) -> str:
    """All that there is to see before submitting."""
    scripts = [("script of each node", task_script(job, cluster))]
    if cluster.kind == "slurm":
        scripts.insert(0, ("batch script", batch_script(job, cluster)))
    parts = [
        ("resolved configuration", dump_config(config)),
        ("nodes", node_plan_text(config, job.command)),
        ("memory", _memory_text(request, cluster)),
        *((title, _without_secrets(text, job)) for title, text in scripts),
    ]
    text = "\n".join(f"==== {title} ====\n{body.rstrip()}\n" for title, body in parts)
    return text + "\nnothing was started\n"


def _memory_text(request: LaunchRequest, cluster: ClusterFile) -> str:
    """`matpo plan` of the recipe; where it cannot be reckoned, why."""
    from megatron_matpo.planning.command import Expectation, make_run_plan
    from megatron_matpo.planning.text import as_text

    try:
        overrides = _as_run(request, [*cluster_overrides(cluster), *request.overrides])
        return as_text(make_run_plan(request.recipe, overrides, Expectation()))
    except ConfigError as error:
        return f"not reckoned: {error}"


def _write(request: LaunchRequest, job: Job) -> int:
    path = Path(request.write)
    text = _without_secrets(sbatch_text(job, _origin(request), request.write), job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}; submit it with: sbatch {path}")
    return 0


def _origin(request: LaunchRequest) -> str:
    """The command that writes the same file again."""
    words = ["matpo", "launch", request.recipe, "--cluster", request.cluster]
    if request.command:
        words += ["--command", request.command]
    if request.model:
        words += ["--model", request.model]
    return " ".join([*words, "--write", request.write, *request.overrides])


def _without_secrets(text: str, job: Job) -> str:
    """`text`, or an error if a secret has found its way into it."""
    for name in job.secret_names:
        value = os.environ.get(name, "")
        if len(value) >= _MIN_SECRET_CHARS and value in text:
            raise ConfigError(
                f"the value of {name} is in the recipe, the cluster file or an override, and would "
                "be written into a batch script; name the variable in secret_env only"
            )
    return text


def _next_steps(config: Config, cluster: ClusterFile, job: Job, submission: Submission) -> str:
    """Where it is, how to follow it, how to stop it."""
    if cluster.kind != "slurm":
        how = "done" if submission.succeeded else "failed"
        return (
            f"{how}; results in {config.run_dir}, NeMo-Run's files in {submission.experiment_dir}"
        )
    where = f" on {cluster.ssh.host}" if cluster.ssh.host else ""
    log = f"{job.run_dir}/logs/slurm-{submission.job_id}.log"
    return "\n".join(
        [
            f"submitted job {submission.job_id}{where}: {job.name}, {job.nodes} node(s)",
            f"  log      {log}",
            f"  follow   matpo logs {job.run_dir} -f",
            f"  state    matpo status {job.run_dir}",
            f"  cancel   scancel {submission.job_id}",
            f"  files    {submission.experiment_dir}",
        ]
    )
