"""Ending early because the supervisor asks for it (`obs.stop_request`), on all ranks at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed as dist

from megatron_matpo.obs.stop_request import is_stop_requested

T = TypeVar("T")
_POLL_S = 0.5


class StopRequested(Exception):
    """Raised on every rank at the same place of a step; not an error."""


def result_or_stop(work: Callable[[], T], run_dir: Path) -> T | None:
    """The result of `work`, or None as soon as a stop is requested.

    `work` runs in a daemon thread, which a stop leaves behind: the process is about to end.

    Raises:
        Exception: whatever `work` raised.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    if is_stop_requested(run_dir):
        return None
    threading.Thread(target=run, name="collect", daemon=True).start()
    while not wait([future], timeout=_POLL_S).done:
        if is_stop_requested(run_dir):
            return None
    return future.result()


def is_stop_agreed(run_dir: Path, group: dist.ProcessGroup) -> bool:
    """Whether rank 0 sees a stop requested. All ranks of the gloo `group` call."""
    flag = torch.zeros(1, dtype=torch.uint8)
    if dist.get_rank(group) == 0 and is_stop_requested(run_dir):
        flag.fill_(1)
    dist.broadcast(flag, src=0, group=group)
    return bool(flag.item())
