"""A real Slurm on this machine: munged, slurmctld and a slurmd per node, all in one folder.

    with LocalSlurm(nodes=2) as slurm:
        job = slurm.sbatch("job.sbatch", cwd=folder)
        assert slurm.wait(job, timeout_s=60) == "COMPLETED"

Nodes are called n1, n2, ... and share this machine's address and files. As on clusters with
cgroups, a signal to a job reaches the tasks themselves, not what they have started
(proctrack/pgid). A requeued job may start again after five seconds; a node that does not answer for
ten is down and its job requeued. Everything is stopped at the end, whatever happened.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import psutil

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_START_TIMEOUT_S = 60.0
# These stay as long as Slurm knows the job (MinJobAge).
FINAL = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
)
_CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
ReturnToService=2
JobRequeue=1
MessageTimeout=5
SlurmdTimeout=10
KillWait=5
InactiveLimit=0
MinJobAge=3600
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why no Slurm can be started here; empty if one can."""
    if os.getuid() != 0:
        return "a Slurm of one's own needs root"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"Slurm is not installed (apt-get install slurm-wlm munge): no {', '.join(missing)}"
    return ""


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class LocalSlurm:
    """Starts on entering, stops on leaving."""

    def __init__(self, nodes: int = 2) -> None:
        """`nodes` names n1 ... of this machine."""
        self.nodes = [f"n{index}" for index in range(1, nodes + 1)]
        # A socket's path must be short, which pytest's folders are not.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> LocalSlurm:
        """Returns when all nodes are idle."""
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops every process of this Slurm, jobs' included."""
        self._stop()

    @property
    def env(self) -> dict[str, str]:
        """Environment in which Slurm's commands talk to this one."""
        own = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}
        inherited = {key: value for key, value in os.environ.items() if "SLURM" not in key}
        return {**inherited, **own}

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run one of Slurm's commands and return what it prints."""
        done = subprocess.run(
            command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """Submit and return the job's id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            env={**self.env, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, as `scontrol show job` names it."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        """As `RUNNING`, `PENDING`, `COMPLETED`."""
        return self.job(job)["JobState"]

    def wait(self, job: str, timeout_s: float) -> str:
        """Return the job's state when it is over."""
        return self.wait_for(job, FINAL, timeout_s)

    def wait_for(self, job: str, states: frozenset[str] | set[str], timeout_s: float) -> str:
        """Return the job's state when it is one of `states`."""
        end = time.monotonic() + timeout_s
        while (state := self.state(job)) not in states:
            assert time.monotonic() < end, (
                f"job {job} is {state} after {timeout_s} s\n{self.logs()}"
            )
            time.sleep(0.3)
        return state

    def requeue(self, job: str) -> None:
        """`scontrol requeue`, as an administrator or a preemption does."""
        self.run("scontrol", "requeue", job)

    def stop_node(self, name: str) -> None:
        """A node dies: its slurmd and all processes of jobs on it, without a word."""
        daemon = self._daemons.pop(f"slurmd-{name}")
        log = str(self.folder / f"slurmd-{name}.log")
        # slurmd and its slurmstepd first: they would tell how a task ended.
        own = [process for process in self._processes() if log in _open_files(process)]
        tasks = [
            process
            for process in self._processes()
            if _environment(process).get("SLURMD_NODENAME") == name
        ]
        for process in [*own, *tasks]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        daemon.wait()

    def start_node(self, name: str) -> None:
        """The node comes back."""
        self._daemon(f"slurmd-{name}", "slurmd", "-D", "-N", name)

    def logs(self, lines: int = 20) -> str:
        """The ends of the daemons' logs."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            text = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"---- {path.name}", *text]))
        return "\n".join(parts)

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        ports = _free_ports(len(self.nodes) + 1)
        host = socket.gethostname()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 "
            "RealMemory=8000 State=UNKNOWN"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        )
        (self.folder / "slurm.conf").write_text(
            _CONF.format(host=host, port=ports[0], folder=self.folder, nodes=nodes)
        )
        files = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munged.log"}
        files |= {"pid-file": "munged.pid", "seed-file": "munge.seed"}
        own = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *own)
        _wait_until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "slurmctld", "-D")
        for name in self.nodes:
            self.start_node(name)
        _wait_until(self._is_idle, "all nodes idle", self.logs)

    def _is_idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%T"],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=30,
        )
        return done.stdout.split() == ["idle"] * len(self.nodes)

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, start_new_session=True
            )

    def _processes(self) -> Iterator[psutil.Process]:
        """Everything that belongs to this Slurm: daemons, steps, tasks and what they started."""
        for process in psutil.process_iter():
            conf = _environment(process).get("SLURM_CONF")
            is_ours = conf == str(self.folder / "slurm.conf") or (
                # Slurm's own processes write their titles over their environment.
                conf is None and any(str(self.folder) in path for path in _open_files(process))
            )
            if is_ours and process.pid != os.getpid():
                yield process

    def _stop(self) -> None:
        with contextlib.suppress(AssertionError, OSError, subprocess.SubprocessError):
            self.run("scancel", "--user=root", "--signal=KILL", "--full")
        left = list(self._processes())
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            _, left = psutil.wait_procs(left, timeout=5)
        for daemon in self._daemons.values():
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _open_files(process: psutil.Process) -> set[str]:
    try:
        return {file.path for file in process.open_files()}
    except (psutil.Error, OSError):
        return set()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def _wait_until(condition, what: str, details=str) -> None:
    end = time.monotonic() + _START_TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {_START_TIMEOUT_S} s\n{details()}"
        time.sleep(0.2)
