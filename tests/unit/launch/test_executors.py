"""Proves that NeMo-Run's job is our own batch script's, and what docker and this machine are asked.

Not proved here: a docker daemon, an SSH server; Slurm itself is in tests/smoke/test_slurm.py.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_matpo.config.cluster_file import (
    BareSection,
    ClusterFile,
    ContainerSection,
    SlurmSection,
    SshSection,
)
from megatron_matpo.config.load import load_recipe
from megatron_matpo.launch import executors
from megatron_matpo.launch.job import Job, Request, cluster_overrides, describe_job
from megatron_matpo.launch.sbatch import preamble, sbatch_text
from tests.helpers.matpo import QUICKSTART

SECRET = "sk-planted-0123456789"
SLURM = SlurmSection(
    account="acc",
    partition="gpu",
    qos="high",
    reservation="res",
    time_limit="1-00:00:00",
    exclude=["n1", "n[3-4]"],
    gpu_type="a800",
    cpus_per_task=96,
    mail_user="me@example.org",
    options=["--comment=a", "--hint=nomultithread", "--overcommit"],
)
PYXIS = ContainerSection(image="r#team/matpo:1", mounts=["/shared/runs:/runs", "/data:/data"])
CLUSTERS = {
    "bare": ClusterFile(slurm=SLURM, bare=BareSection("/shared/repo", setup=["module load cuda"])),
    "default": ClusterFile(),
    "pyxis": ClusterFile(slurm=SLURM, container=PYXIS, run_dir="/runs", env={"A": "b c"}),
    "ssh": ClusterFile(
        slurm=SLURM,
        bare=BareSection("/shared/repo"),
        ssh=SshSection("login", "me", 22, "~/.ssh/id", "/shared/jobs"),
    ),
    "secrets": ClusterFile(secret_env=["SERPER_API_KEY"], secret_file="~/keys", interface="ib0"),
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    import nemo_run.config

    monkeypatch.setattr(nemo_run.config, "_NEMORUN_HOME", str(tmp_path / "nemo"))
    monkeypatch.setenv("SERPER_API_KEY", SECRET)
    # NeMo-Run's commands pass the standard input on, which pytest does not let anybody read.
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return tmp_path / "nemo"


def job_of(cluster: ClusterFile, gpus: int = 0) -> Job:
    base = [item for item in cluster_overrides(cluster) if item.startswith("run.dir")]
    config = load_recipe(QUICKSTART, [*base, f"cluster.gpus_per_node={gpus}"])
    words = ("a.b=[x, 'y z']", "c=$HOME")
    return describe_job(config, cluster, Request("train", "recipes/quickstart.yaml", words))


def flags(script: str) -> set[str]:
    found = set(re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE))
    # Slurm takes NeMo-Run's quotes for nothing.
    return {line.replace("'", "") for line in found if not line.startswith("--output")}


@pytest.mark.parametrize("name", CLUSTERS)
def test_both_scripts_ask_for_the_same_and_behave_alike(name, home):
    cluster = CLUSTERS[name]
    job = job_of(cluster, gpus=8)
    ours, theirs = sbatch_text(job, "", "f"), executors.batch_script(job, cluster)
    assert flags(theirs) == flags(ours)
    assert preamble(job) in ours
    assert preamble(job) in theirs
    # NeMo-Run's --wait=60 would end the first node while it still writes; the last one counts.
    (srun,) = [line for line in theirs.splitlines() if line.startswith("srun --output")]
    assert [word for word in srun.split() if word.startswith("--wait")][-1] == "--wait=0"
    assert "--kill-on-bad-exit=1 --wait=0" in ours
    assert "TORCHX_MAX_RETRIES=0\n" in theirs, "NeMo-Run requeues nothing by itself"
    assert not [path for path in home.rglob("*") if path.is_file()], "a look leaves nothing"


def test_the_slurm_options_are_all_there():
    text = sbatch_text(job_of(CLUSTERS["bare"], gpus=8), "", "f")
    assert flags(text) == {
        *("--job-name=matpo-quickstart", "--nodes=1", "--ntasks-per-node=1", "--gres=gpu:a800:8"),
        *("--cpus-per-task=96", "--mem=0", "--time=1-00:00:00", "--account=acc"),
        *("--partition=gpu", "--qos=high", "--reservation=res", "--exclude=n1,n[3-4]"),
        *("--mail-user=me@example.org", "--mail-type=FAIL,REQUEUE,END", "--exclusive"),
        *("--signal=USR1@1200", "--requeue", "--open-mode=append", "--comment=a"),
        *("--hint=nomultithread", "--overcommit"),
    }


@pytest.mark.parametrize(
    ("request_", "flag"), [("gpus-per-node", "--gpus-per-node=a800:8"), ("none", "--mem=0")]
)
def test_other_spellings_of_gpus(request_, flag):
    cluster = ClusterFile(slurm=SlurmSection(gpu_request=request_, gpu_type="a800"))
    found = flags(sbatch_text(job_of(cluster, gpus=8), "", "f"))
    assert flag in found
    assert not any("gres" in item for item in found)


def test_a_container_has_its_mounts_and_sees_the_run_folder():
    job = job_of(CLUSTERS["pyxis"])
    assert (job.run_dir, job.task_run_dir) == ("/shared/runs/quickstart", "/runs/quickstart")
    ours = sbatch_text(job, "", "f")
    theirs = executors.batch_script(job, CLUSTERS["pyxis"])
    done = subprocess.run(["bash", "-c", ours, "-", "run.dir=/x"], capture_output=True, text=True)
    assert (done.returncode, "set run_dir in the cluster file" in done.stderr) == (2, True)
    for word in (
        "--container-image=r#team/matpo:1",
        "--container-mounts=/shared/runs:/runs,/data:/data",
        "--container-workdir=/opt/megatron_matpo",
        "--container-env=PYTHONUNBUFFERED,A",
    ):
        assert word in ours.replace("'", "")
    plain = theirs.replace("'", "")
    assert (
        "--container-image r#team/matpo:1 --container-mounts /shared/runs:/runs,/data:/data,/"
        in plain
    )
    assert "--container-env PYTHONUNBUFFERED,A" in plain
    assert "export A='b c'" in theirs


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_written_scripts_are_clean_shell(name, tmp_path):
    cluster = CLUSTERS[name]
    job = job_of(cluster)
    for text in (sbatch_text(job, "", "f"), "#!/bin/bash\n" + executors.task_script(job, cluster)):
        (tmp_path / "script").write_text(text)
        # SC2016: a $ in an override is meant as it stands.
        command = ["shellcheck", "--shell=bash", "--exclude=SC2016", str(tmp_path / "script")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_secrets_are_names_only_and_the_interface_is_told_to_all():
    cluster = CLUSTERS["secrets"]
    job = job_of(cluster)
    text = sbatch_text(job, "", "f") + executors.batch_script(job, cluster)
    assert 'matpo_read_secrets "$HOME"/keys SERPER_API_KEY' in text
    assert "export NCCL_SOCKET_IFNAME=ib0\nexport GLOO_SOCKET_IFNAME=ib0" in text
    assert SECRET not in text
    assert cluster_overrides(cluster) == (
        "cluster.interface=ib0",
        "run.save_on_stop=true",
        "run.save_timeout_s=1200",
    )


def test_ssh_goes_where_the_file_says():
    executor = executors.slurm_executor(job_of(CLUSTERS["ssh"]), CLUSTERS["ssh"])
    tunnel = executor.tunnel
    assert (tunnel.host, tunnel.user, tunnel.job_dir) == ("login", "me", "/shared/jobs")
    assert tunnel.identity == os.path.expanduser("~/.ssh/id")
    script = executors.batch_script(job_of(CLUSTERS["ssh"]), CLUSTERS["ssh"])
    assert "bash /shared/jobs/matpo-quickstart/" in script
    assert "--output=/shared/repo/runs/quickstart/logs/slurm-%j.log" in script


def test_the_task_of_a_node_gets_the_words_as_they_are(tmp_path):
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    show.chmod(0o755)
    cluster = ClusterFile(bare=BareSection(str(tmp_path), python=str(show)))
    script = executors.task_script(job_of(cluster), cluster)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("<train><recipes/quickstart.yaml><a.b=[x, 'y z']><c=$HOME>")
    assert "<--run-dir><runs/quickstart>" in done.stdout


class FakeDocker:
    """A client of a daemon that only writes down."""

    def __init__(self) -> None:
        self.containers = self.networks = self
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def run(self, *arguments: Any, **options: Any) -> None:
        self.calls.append((arguments, options))


def test_what_docker_is_asked(monkeypatch, tmp_path):
    from nemo_run.core.execution.docker import DockerContainer

    image = ContainerSection(image="matpo:1", mounts=[f"{tmp_path}:/runs"], shm_size="8g")
    cluster = ClusterFile(
        kind="docker",
        container=image,
        run_dir="/runs",
        secret_env=["SERPER_API_KEY"],
        secret_file="/home/me/keys",
    )
    job = job_of(cluster, gpus=8)
    executor = executors.docker_executor(job, cluster)
    executor.experiment_id = "e"
    client = FakeDocker()
    command = ["bash", "/nemo_run/scripts/task.sh"]
    container = DockerContainer(name="task", command=command, executor=executor, extra_env={})
    container.run(client, "1")  # pyright: ignore[reportArgumentType]
    ((arguments, options),) = client.calls
    assert arguments[0] == "matpo:1"
    assert arguments[1].startswith('bash -c "bash /nemo_run/scripts/task.sh 2>&1 | tee')
    assert options["volumes"] == [f"{tmp_path}:/runs", "/home/me/keys:/home/me/keys:ro"]
    assert (options["network"], options["ipc_mode"], options["shm_size"]) == ("host", "host", "8g")
    assert options["device_requests"][0]["Count"] == -1
    assert options["entrypoint"] == "/usr/bin/env"
    assert options["user"] == f"{os.getuid()}:{os.getgid()}"
    assert SECRET not in str(options) + str(arguments)
    script = executors.task_script(job, cluster)
    assert script.startswith("cd /opt/megatron_matpo || exit 2\n")
    assert "matpo_read_secrets /home/me/keys SERPER_API_KEY" in script
    assert (
        script.rstrip()
        .splitlines()[-1]
        .startswith("exec /opt/trainer/bin/python -m megatron_matpo train recipes/quickstart.yaml")
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("code", [0, 3])
def test_on_this_machine_it_runs_to_the_end(tmp_path, home, code):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/words\nexit {code}\n')
    python.chmod(0o755)
    cluster = ClusterFile(
        kind="local",
        bare=BareSection(str(tmp_path), python=str(python)),
        secret_env=["SERPER_API_KEY"],
    )
    done = executors.submit(job_of(cluster), cluster)
    assert done.succeeded == (code == 0)
    assert (tmp_path / "words").read_text().startswith("-m megatron_matpo train recipes/")
    texts = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    assert texts, "NeMo-Run's files were found"
    assert not any(SECRET.encode() in text for text in texts)
