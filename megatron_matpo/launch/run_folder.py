"""`runs/NAME/`: one supervisor at a time, and a resumed run that is the run it says it is.

config.yaml  plan.json  run.json  logs/  status/  rollouts/  checkpoints/  supervisor.lock
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_matpo import __version__
from megatron_matpo.config.load import diff_configs, dump_config, load_resolved
from megatron_matpo.config.plan import Plan
from megatron_matpo.config.root import Config
from megatron_matpo.errors import ConfigError, MatpoError
from megatron_matpo.evaluation.inputs import has_results
from megatron_matpo.launch.torchrun_files import EXITS_FILES
from megatron_matpo.obs import failure
from megatron_matpo.obs.restart_request import clear_restart_requests
from megatron_matpo.obs.status import clear_status
from megatron_matpo.obs.stop_request import clear_stop_request

CONFIG_FILE = "config.yaml"
PLAN_FILE = "plan.json"
_RUN_FILE = "run.json"
_LOCK_FILE = "supervisor.lock"
_FOLDERS = ("logs", "status", "rollouts", "checkpoints")

# What may change when a run is resumed: its length, what is recorded, where and how fast it runs.
# Nothing here changes what a step computes from the same checkpoint.
CHANGEABLE = (
    "run.steps",
    "run.dir",
    "run.stop_grace_s",
    "run.start_timeout_s",
    "run.save_on_stop",
    "cluster.host",
    "cluster.base_port",
    "cluster.interface",
    "cluster.num_nodes",
    "cluster.trainer_nodes",
    "cluster.gpus_per_node",
    "checkpoint.*",
    "obs.*",
    "doctor.*",
    "eval.*",
    "rollout.python",
    "rollout.router",
    "rollout.num_servers",
    "rollout.tensor",
    "rollout.mem_fraction",
    "rollout.max_total_tokens",
    "rollout.max_running_requests",
    "rollout.max_concurrent_episodes",
    "rollout.health.*",
    "rollout.max_engine_restarts",
    "rollout.restart_backoff_*",
    "*timeout_s",
    "tools.servers.*.num_processes",
    "tools.servers.*.max_concurrency",
    "weight_sync.bucket_mb",
    "weight_sync.folder",
    "weight_sync.retries",
    "weight_sync.verify",
    "sft.steps",
    "sft.export",
)
# An evaluation also resumes when settings differ that only a trainer reads. Which model and rows
# its results belong to is compared by content (`evaluation.inputs`).
CHANGEABLE_EVAL = (
    *CHANGEABLE,
    "run.steps",
    "data.*",
    "parallel.*",
    "precision",
    "algo.*",
    "optim.*",
    "train.*",
    "weight_sync.*",
    "sft.*",
)


@dataclass(frozen=True)
class RunFolder:
    """An opened run folder; its lock is held until this process and its forks have ended."""

    path: Path
    lock_descriptor: int

    def write_plan(self, plan: Plan) -> None:
        """Write `plan.json`, which every role reads."""
        _write(self.path / PLAN_FILE, plan.to_json())


def open_run_folder(
    config: Config, command: str, *, accept_changes: bool = False
) -> tuple[RunFolder, bool]:
    """Create or reopen the run's folder and write `config.yaml`.

    Args:
        config: a checked configuration.
        command: `train`, `sft` or `eval`.
        accept_changes: resume although settings differ that change what a step computes.

    Returns:
        The folder, and whether it holds an earlier attempt of the run.

    Raises:
        MatpoError: another supervisor is using the folder.
        ConfigError: the folder belongs to another command, or its configuration differs.
    """
    path = Path(config.run_dir).resolve()
    try:
        for name in _FOLDERS:
            (path / name).mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path)
    except OSError as error:
        raise ConfigError(
            f"run.dir={config.run.dir}: the run's folder cannot be made or written ({error})"
        ) from error
    try:
        is_resumed = _check_same_run(path, config, command, accept_changes)
    except ConfigError:
        os.close(descriptor)
        raise
    _write(path / CONFIG_FILE, dump_config(config))
    record = {"command": command, "version": __version__, "started_at": time.time()}
    _write(path / _RUN_FILE, json.dumps(record))
    clear_status(path)
    failure.clear(path)
    clear_stop_request(path)
    clear_restart_requests(path)
    for exits in (path / "status").glob(EXITS_FILES):
        exits.unlink()
    return RunFolder(path, descriptor), is_resumed


def is_in_use(path: Path) -> bool:
    """Whether a supervisor holds the folder's lock right now."""
    try:
        with (path / _LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _lock(path: Path) -> int:
    """Take the folder's lock; the kernel drops it when the holder ends, however it ends."""
    descriptor = os.open(path / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise MatpoError(
            f"{path}: another run is using this folder ({holder or 'process unknown'}); stop it, "
            "or choose another run.name"
        ) from None
    except OSError:
        # Some shared file systems are mounted without locks (Lustre without `flock`); a run that
        # cannot be protected from a second one is better than no run.
        return descriptor
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"pid {os.getpid()}\n".encode(), 0)
    return descriptor


def _check_same_run(path: Path, config: Config, command: str, accept_changes: bool) -> bool:
    """Whether the folder holds something to resume from; an error if it is another run's."""
    if not (path / CONFIG_FILE).is_file():
        return False
    if not (path / "checkpoints" / "latest").is_file() and not has_results(path):
        return False  # nothing was kept of the earlier attempt, so it binds nobody
    before = previous_command(path)
    if before not in ("", command):
        raise ConfigError(
            f"run.name={config.run.name}: {path} holds a `matpo {before}` run; choose another name"
        )
    try:
        old = load_resolved(str(path / CONFIG_FILE))
    except ConfigError as error:
        if accept_changes:
            return True
        raise ConfigError(
            f"run.name={config.run.name}: the configuration of the earlier attempt cannot be read "
            f"(another version wrote it?); choose another run.name, or resume with "
            f"--accept-changes:\n{error}"
        ) from error
    changed = changed_settings(old, config, command)
    if changed and not accept_changes:
        lines = [f"  {key}: {was!r} -> {now!r}" for key, (was, now) in changed.items()]
        raise ConfigError(
            f"run.name={config.run.name}: {path} holds a run with other settings; choose another "
            "run.name, or resume it with --accept-changes:\n" + "\n".join(lines)
        )
    return True


def changed_settings(old: Config, new: Config, command: str) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (old, new) of settings that change what `command` computes."""
    changeable = CHANGEABLE_EVAL if command == "eval" else CHANGEABLE
    return {
        key: values
        for key, values in diff_configs(old, new).items()
        if not any(fnmatchcase(key, pattern) for pattern in changeable)
    }


def previous_command(path: Path) -> str:
    """`train`, `sft` or `eval`, whichever used the folder last; empty if none did."""
    try:
        return str(json.loads((path / _RUN_FILE).read_text())["command"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _write(path: Path, text: str) -> None:
    """Replace `path` in one go: a reader sees the old or the new content."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)
