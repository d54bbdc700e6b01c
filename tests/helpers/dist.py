"""Run functions on several gloo ranks, with a deadline.

Importing Megatron takes ten seconds, so it is done once, in a server from which ranks are forked,
and `RankPool` keeps its processes and runs one function after the other on them. After a failure or
a timeout its processes are killed and started anew.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

from megatron_matpo.ports import free_ports

_POLL_S = 0.05


@dataclass(frozen=True)
class RankInfo:
    """What a rank function gets first: enough for `init_parallel`."""

    rank: int
    world_size: int
    port: int


def free_port() -> int:
    """A TCP port of the loopback that nobody will take before it is used."""
    return free_ports("127.0.0.1", 1)[0]


def _serve(connection: Connection) -> None:
    """Life of a rank: receive (function, arguments), send (result, error), until told to stop."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        # Plain pickle: torch's own reductions would share memory with a process that may end.
        try:
            function, info, args = pickle.loads(message)
            answer = pickle.dumps((function(info, *args), ""))
        except BaseException:
            answer = pickle.dumps((None, traceback.format_exc()))
        # Models and process groups form cycles; a gloo group keeps its threads until it is freed.
        gc.collect()
        connection.send_bytes(answer)


def warm_context() -> ForkServerContext:
    """Starts processes that have Megatron imported already, and have one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    # Has no effect on a server that runs already. Nothing here starts a thread on import.
    context.set_forkserver_preload(["tests.helpers.preload"])
    return context


class RankPool:
    """Processes that serve as ranks; a context manager."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._ranks: list[tuple[Any, Connection]] = []

    def __enter__(self) -> RankPool:
        """For `with`."""
        return self

    def __exit__(self, *_: object) -> None:
        """For `with`."""
        self.close()

    def close(self) -> None:
        """Kill all ranks and wait for them."""
        for process, connection in self._ranks:
            process.kill()
            connection.close()
        for process, _ in self._ranks:
            process.join(timeout=10)
        self._ranks = []

    def run(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0
    ) -> list[Any]:
        """`function(RankInfo, *args)` on ranks 0 .. world_size-1; their results in order.

        Raises:
            AssertionError: a rank raised (with its traceback), died, or the deadline passed.
        """
        self._grow(world_size)
        port = free_port()
        for rank in range(world_size):
            info = RankInfo(rank, world_size, port)
            self._ranks[rank][1].send_bytes(pickle.dumps((function, info, args)))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) < world_size:
            for rank in set(range(world_size)) - set(results):
                problem = self._collect(rank, results)
                if not problem and time.monotonic() > deadline:
                    problem = f"no answer within {timeout_s:g} s"
                if problem:
                    self.close()
                    raise AssertionError(f"rank {rank} of {world_size}: {problem}")
            time.sleep(_POLL_S)
        return [results[rank] for rank in range(world_size)]

    def _collect(self, rank: int, results: dict[int, Any]) -> str:
        """Take a rank's answer if it is there; otherwise say what is wrong with the rank, if so."""
        process, connection = self._ranks[rank]
        try:
            if connection.poll():
                results[rank], error = pickle.loads(connection.recv_bytes())
                return error
        except (EOFError, OSError):
            pass
        return "" if process.is_alive() else f"died with exit code {process.exitcode}"

    def _grow(self, world_size: int) -> None:
        """Start missing processes."""
        context = warm_context()
        while len(self._ranks) < world_size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """`RankPool.run` on processes of its own, which are gone when it returns."""
    with RankPool() as pool:
        return pool.run(function, world_size, *args, timeout_s=timeout_s)
