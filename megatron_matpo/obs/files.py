"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_atomic(path: Path, data: str | bytes, *, durable: bool = True, mode: int = 0o666) -> None:
    """Replace `path` by `data` in one step; parent folders are made.

    `durable=False` skips fsync: right for files that only matter while the machine is up. `mode`
    are the permissions of the new file from its first byte on, less the process's umask.
    The temporary name holds the pid, so that two processes never write into the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    raw = data.encode() if isinstance(data, str) else data
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as file:
            file.write(raw)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Fsync a file, or a folder and everything in it."""
    if path.is_dir():
        for child in path.iterdir():
            flush_to_disk(child)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(temporary: Path, target: Path) -> None:
    """Put `temporary` in place of `target` once it is on disk.

    A folder cannot be replaced in one system call; an older `target` is moved aside first, so that
    at every moment one complete folder exists under one of the two names.
    """
    flush_to_disk(temporary)
    target = target.resolve()
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    flush_to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)
