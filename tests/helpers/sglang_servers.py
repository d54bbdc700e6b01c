"""Real SGLang servers on the CPU, started together and ended with their whole process trees."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_matpo.ports import free_ports
from megatron_matpo.rollout.engine_client import EngineClient
from megatron_matpo.rollout.engine_command import EngineSpec, engine_command

ROLLOUT_PYTHON = Path(__file__).parents[2] / ".venv-rollout" / "bin" / "python"
KEY = "a-key-of-these-servers"
START_LIMIT_S = 300.0


def server_marks(timeout_s: int) -> list[pytest.MarkDecorator]:
    """What a file of tests with such servers sets as `pytestmark`."""
    return [
        pytest.mark.smoke,
        pytest.mark.slow,
        pytest.mark.timeout(timeout_s),
        pytest.mark.skipif(not ROLLOUT_PYTHON.exists(), reason="no .venv-rollout: run make setup"),
    ]


@dataclass(frozen=True)
class SglangServer:
    """One server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self, request_timeout_s: float = 60.0) -> EngineClient:
        """A new client, for one event loop."""
        return EngineClient(self.url, KEY, request_timeout_s=request_timeout_s)

    def signal(self, number: int) -> None:
        """Send a signal to the server, its scheduler and its detokenizer."""
        with contextlib.suppress(psutil.NoSuchProcess):
            server = psutil.Process(self.process.pid)
            for process in (*server.children(recursive=True), server):
                with contextlib.suppress(psutil.NoSuchProcess):
                    os.kill(process.pid, number)


@contextlib.contextmanager
def sglang_servers(
    model: Path, folder: Path, count: int, *, mem_fraction: float = 0.1
) -> Iterator[list[SglangServer]]:
    """`count` servers of `model` that generate; logs go to `folder`."""
    ports = free_ports("127.0.0.1", 2 * count)
    servers = []
    for i in range(count):
        command = engine_command(
            EngineSpec(
                python=str(ROLLOUT_PYTHON),
                model_path=str(model),
                port=ports[2 * i],
                internal_port=ports[2 * i + 1],
                dtype="float32",
                max_total_tokens=4096,
                mem_fraction=mem_fraction,
                api_key=KEY,
            )
        )
        log = folder / f"engine-{i}.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command.argv, env={**os.environ, **command.env}, stdout=sink, stderr=sink
            )
        servers.append(SglangServer(f"http://127.0.0.1:{ports[2 * i]}", process, log))
    try:
        asyncio.run(_wait_for_all(servers))
        yield servers
    finally:
        for server in servers:
            server.signal(9)
            server.process.wait()


async def _wait_for_all(servers: list[SglangServer]) -> None:
    for server in servers:
        client = server.client()
        try:
            await client.wait_ready(
                deadline_s=START_LIMIT_S,
                process_alive=lambda process=server.process: process.poll() is None,
            )
        except Exception as error:
            raise AssertionError(f"{error}\n{server.log.read_text()[-3000:]}") from error
        finally:
            await client.close()
