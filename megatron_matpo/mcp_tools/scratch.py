"""A folder that somebody else fills without restraint: measured and deleted without trust."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

MAX_ENTRIES, MAX_DEPTH = 1000, 32


def exceeds(folder: str, max_bytes: int) -> bool:
    """Whether a folder holds more than `max_bytes`, too many entries, or too deep folders."""
    todo = [(folder, 0)]
    num_bytes = num_entries = 0
    while todo:
        path, depth = todo.pop()
        if depth > MAX_DEPTH:
            return True
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    num_entries += 1
                    if entry.is_dir(follow_symlinks=False):
                        todo.append((entry.path, depth + 1))
                    else:
                        num_bytes += entry.stat(follow_symlinks=False).st_blocks * 512
                    if num_bytes > max_bytes or num_entries > MAX_ENTRIES:
                        return True
        except FileNotFoundError:
            continue  # deleted while it was looked at
        except OSError:
            return True  # a name too long for the system: nothing that code needs
    return False


def remove_tree(folder: str) -> None:
    """Delete a folder, however deeply its content is nested, also if others delete in it too."""
    try:
        while os.path.lexists(folder):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)
    except (OSError, RecursionError):
        # rm walks by file handles and keeps no stack.
        subprocess.run(
            ["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL, check=False, timeout=60
        )
