"""Two ranks that save without end until they are killed, started by forking a warm process.

Importing Megatron takes seconds; a nursery imports it once, stays without threads and process
groups, and forks the ranks of every attempt.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.optimizer_state import members_of
from megatron_matpo.obs.files import write_atomic
from tests.helpers.dist import RankInfo, free_port, warm_context
from tests.helpers.megatron_ranks import layout

WORLD_SIZE = 2
_POLLS_PER_STEP = 3
_POLL_S = 0.003


def _state_tensors(actor: MegatronActor) -> Iterator[torch.Tensor]:
    """Everything that a checkpoint of this rank must bring back, besides random states."""
    for model in actor._models:
        yield from model.parameters()
    for member in members_of(actor._optimizer):
        for state in member.optimizer.state.values():
            yield from (state["exp_avg"], state["exp_avg_sq"])


def save_for_ever(info: RankInfo, config: Config, folder: Path, report: Path) -> None:
    """Restore, say what came back, then fill everything with N and save step N, N + 1, ..."""
    with layout(info, config) as state:
        hf = HfModelConfig.from_folder(config.model.path)
        actor = MegatronActor(config, hf, state)
        extra = actor.restore(folder)
        step = extra["step"] if extra else 0
        wrong = sum(int((t != step).sum()) for t in _state_tensors(actor)) if extra else 0
        write_atomic(report, json.dumps({"step": step, "wrong": wrong}), durable=False)
        while True:
            step += 1
            with torch.no_grad():
                for tensor in _state_tensors(actor):
                    tensor.fill_(step)
            actor.save(folder, step, {"step": step})
            for _ in range(_POLLS_PER_STEP):
                actor.poll_save()
                time.sleep(_POLL_S)


def _nursery(connection: Connection) -> None:
    """Fork two ranks for every (config, folder, reports) that comes; answer with their pids."""
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        try:
            config, folder, reports = connection.recv()
        except EOFError:
            return
        port, pids = free_port(), []
        for rank in range(WORLD_SIZE):
            pid = os.fork()
            if pid == 0:
                try:
                    info = RankInfo(rank, WORLD_SIZE, port)
                    save_for_ever(info, config, folder, reports[rank])
                except BaseException as error:
                    write_atomic(reports[rank], json.dumps({"error": repr(error)}), durable=False)
                finally:
                    os._exit(1)
            pids.append(pid)
        connection.send(pids)


class Nursery:
    """Starts and kills attempts."""

    def __init__(self, connection: Connection) -> None:
        """`connection` leads to the warm process."""
        self._connection = connection

    def start(self, config: Config, folder: Path, reports: list[Path]) -> list[int]:
        """Pids of the ranks."""
        self._connection.send((config, folder, reports))
        assert self._connection.poll(60), "the nursery does not answer"
        return self._connection.recv()


@contextmanager
def nursery() -> Iterator[Nursery]:
    """A warm process; it is gone after the block."""
    context = warm_context()
    ours, theirs = context.Pipe()
    process = context.Process(target=_nursery, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Nursery(ours)
    finally:
        process.kill()
        process.join(10)


def kill(pids: list[int]) -> None:
    """SIGKILL, and wait until they are gone (the nursery leaves no zombies)."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.002)


def wait_for(paths: list[Path], timeout_s: float = 60.0) -> list[dict[str, Any]]:
    """JSON content of `paths`, as soon as all are there."""
    end = time.monotonic() + timeout_s
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"none of {[p.name for p in paths]} in {timeout_s} s"
        time.sleep(0.002)
    return [json.loads(path.read_text()) for path in paths]
