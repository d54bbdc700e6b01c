"""Starts MCP servers over streamable HTTP as processes: the SDK's own, and one that misbehaves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_matpo.config.tools import McpServerConfig
from megatron_matpo.ports import free_ports

_FOLDER = Path(__file__).parents[1] / "unit" / "mcp_tools"
SDK = str(_FOLDER / "http_server.py")
ROGUE_HTTP = str(_FOLDER / "rogue_http_server.py")


class HttpServer:
    """A server process at one port; it can be killed and started again."""

    def __init__(self, script: str, *arguments: str, **env: str) -> None:
        self.port = free_ports("127.0.0.1", 1)[0]
        self._command = [sys.executable, script, str(self.port), *arguments]
        self._env = os.environ | env
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it listens."""
        self._process = subprocess.Popen(self._command, env=self._env)
        deadline = time.monotonic() + 30.0
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise AssertionError(f"{self._command} does not listen")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def config(self, **settings: object) -> McpServerConfig:
        """How to reach it, with deadlines that a busy machine keeps."""
        defaults: dict[str, object] = {
            "start_timeout_s": 20.0,
            "call_timeout_s": 20.0,
            "backoff_s": 0.1,
        }
        url = f"http://127.0.0.1:{self.port}/mcp"
        return McpServerConfig(url=url, **(defaults | settings))  # type: ignore[arg-type]


@contextmanager
def http_server(script: str, *arguments: str, **env: str) -> Iterator[HttpServer]:
    server = HttpServer(script, *arguments, **env)
    server.start()
    try:
        yield server
    finally:
        server.kill()
