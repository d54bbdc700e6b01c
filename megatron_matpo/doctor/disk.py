"""Disks, shared memory and open files: room, speed, and what kind of file system it is."""

from __future__ import annotations

import os
import resource
import secrets
import shutil
import time
from pathlib import Path

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig, check_layout
from megatron_matpo.doctor.lines import Line, Site
from megatron_matpo.errors import ConfigError
from megatron_matpo.planning.parameters import total_parameters
from megatron_matpo.planning.shape import job_of

_NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "fuse", "weka", "panfs", "9p")
_MIN_SHM_PER_GPU = 2**30
"""NCCL and data loaders; docker's default is 64 MiB in all.
Source: docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html, shared memory."""
_MIN_SHM = 256 * 2**20
_OPEN_PER_EPISODE = 2
_OPEN_BESIDES = 1024
"""Files of the process itself: libraries, logs, pipes to tools. A generous guess."""
_CHUNK = 4 * 2**20


def standing(path: str) -> Path:
    """The folder itself, or its nearest parent that exists: the doctor makes no folders."""
    folder = Path(path).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def checkpoint_bytes(config: Config) -> int:
    """Size of one checkpoint: weights and the optimizer's state of all ranks; 0 if unknown.

    fp32 copies of bf16 parameters and two fp32 moments (`planning/parameters.py`). Of adapters the
    optimizer is small beside the weights, and left out.
    """
    if not (Path(config.model.path) / "config.json").is_file():
        return 0
    try:
        hf = HfModelConfig.from_folder(config.model.path)
        if check_layout(hf, config.parallel):
            return 0
        job = job_of(config, hf)
    except ConfigError:
        return 0
    optimizer = 0 if config.lora.rank > 0 else 12 if job.parameters == "bf16" else 8
    return total_parameters(job) * (job.element_bytes + optimizer)


def check_space(site: Site) -> list[Line]:
    """`disk.space`: the checkpoints that are kept, and the one being written."""
    name, config = "disk.space", site.config
    folder = standing(config.run_dir)
    free = shutil.disk_usage(folder).free
    one = checkpoint_bytes(config)
    seen = f"{_gb(free)} free in {folder}"
    fix = "free some, set run.dir to a larger disk, or lower checkpoint.keep_last"
    if not os.access(folder, os.W_OK):
        return [Line(name, "fail", f"{folder} cannot be written to", "set run.dir")]
    if not one:
        return [Line(name, "pass", f"{seen}; what the recipe needs is not known")]
    kept = config.checkpoint.keep_last + 1
    seen += f"; a checkpoint has about {_gb(one)}, {kept} of them {_gb(kept * one)}"
    if free < one:
        return [Line(name, "fail", seen, fix)]
    if free < kept * one:
        return [Line(name, "warn", seen, fix)]
    return [Line(name, "pass", seen)]


def check_speed(site: Site) -> list[Line]:
    """`disk.speed` and `disk.clock`: one file is written with fsync, looked at and deleted."""
    folder = standing(site.config.run_dir)
    size = site.disk_test_bytes
    file = folder / f".matpo-doctor-{secrets.token_hex(6)}"
    try:
        seconds, skew_s = _write(file, size)
    except OSError as error:
        seen = f"{folder}: {error.strerror or error}"
        return [Line("disk.speed", "fail", seen, "set run.dir to a disk that can be written to")]
    finally:
        file.unlink(missing_ok=True)
    speed = size / seconds / 1e6
    limit = site.config.doctor.min_disk_mb_s
    seen = f"{speed:.0f} MB/s ({size // 2**20} MiB with fsync in {folder})"
    if speed < limit:
        fix = "checkpoints will be slow: set run.dir to a faster file system"
        lines = [Line("disk.speed", "warn", f"{seen}; expected {limit:.0f} MB/s", fix)]
    else:
        lines = [Line("disk.speed", "pass", seen)]
    return [*lines, clock_line(site.config, skew_s)]


def _write(file: Path, size: int) -> tuple[float, float]:
    """Seconds that it took, and by how much the file's time is ahead of this machine's clock."""
    chunk = os.urandom(min(size, _CHUNK))  # a disk that compresses must not look fast
    start = time.monotonic()
    with file.open("wb") as handle:
        for _ in range(max(1, size // len(chunk))):
            handle.write(chunk)
        handle.flush()
        before = time.time()
        os.fsync(handle.fileno())
        seconds = time.monotonic() - start
        os.utime(handle.fileno())  # sets the time of whoever keeps the file
        changed = os.stat(file).st_mtime
        after = time.time()
    # Somewhere between: only what lies outside is skew.
    skew = changed - after if changed > after else min(0.0, changed - before)
    return max(seconds, 1e-9), skew


def clock_line(config: Config, skew_s: float) -> Line:
    """`disk.clock`: this machine's clock against that of the file system."""
    seen = f"file times are {skew_s:+.2f} s from this clock"
    if abs(skew_s) > config.doctor.max_clock_skew_s:
        fix = "start chrony or ntpd on this node"
        return Line("disk.clock", "warn", seen, fix)
    return Line("disk.clock", "pass", seen)


def file_system_of(folder: Path, mounts: str) -> str:
    """Type of the file system that holds `folder`, from the text of /proc/mounts."""
    best, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        if folder.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def check_file_system(site: Site) -> list[Line]:
    """`disk.file_system`: what kind the run folder is on; a cache in SQLite needs a local one."""
    name, cache = "disk.file_system", site.config.tools.cache
    mounts = (site.root / "proc/mounts").read_text()
    folder = standing(site.config.run_dir)
    seen = f"{folder} is on {_kind(folder, mounts)}"
    if cache.mode == "read_write":
        place = standing(os.path.dirname(cache.path)) if cache.path else folder
        if _kind(place, mounts).startswith(_NETWORK):
            seen += (
                f"; the cache of replies in {place} locks its file, which network disks do badly"
            )
            return [Line(name, "warn", seen, "tools.cache.path=FILE on a disk of the first node")]
    return [Line(name, "pass", seen)]


def _kind(folder: Path, mounts: str) -> str:
    return file_system_of(folder.resolve(), mounts) or "an unknown file system"


def check_shared_memory(site: Site) -> list[Line]:
    """`disk.shm`: /dev/shm, which NCCL and gloo use inside a node."""
    name, folder = "disk.shm", site.root / "dev/shm"
    if not folder.is_dir():
        return [Line(name, "fail", "no /dev/shm", "mount a tmpfs there")]
    total = shutil.disk_usage(folder).total
    wanted = max(_MIN_SHM, site.config.cluster.gpus_per_node * _MIN_SHM_PER_GPU)
    seen = f"/dev/shm has {_gb(total)}"
    if total < wanted:
        status = "fail" if site.wants_gpus else "warn"
        fix = f"docker: --shm-size={wanted // 2**20}m or --ipc=host"
        return [Line(name, status, f"{seen}; expected {_gb(wanted)}", fix)]
    return [Line(name, "pass", seen)]


def check_open_files(site: Site) -> list[Line]:
    """`limit.files`: the manager holds connections of all its episodes."""
    name, rollout = "limit.files", site.config.rollout
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _OPEN_PER_EPISODE * rollout.max_concurrent_episodes + _OPEN_BESIDES
    seen = f"{soft} open files (hard limit {hard})"
    if soft != resource.RLIM_INFINITY and soft < needed:
        fix = f"ulimit -n {needed}, or lower rollout.max_concurrent_episodes"
        return [Line(name, "warn", f"{seen}; the recipe may need {needed}", fix)]
    return [Line(name, "pass", seen)]


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.0f} MB"
