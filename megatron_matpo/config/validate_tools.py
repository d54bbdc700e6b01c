"""Violations in the section `tools`: servers, cache, URL policy."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_matpo.config.root import Config
from megatron_matpo.config.tools import McpServerConfig

_SECRET_NAME = re.compile(r"(API_?KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL)", re.IGNORECASE)


def check_tools(config: Config) -> Iterator[str]:
    """Violations that the configuration alone shows."""
    for name, server in config.tools.servers.items():
        yield from check_server(name, server)


def check_server(name: str, server: McpServerConfig) -> Iterator[str]:
    """Violations of one tool server by itself."""
    path = f"tools.servers.{name}"
    if not server.command:
        yield f"{path}.command=: expected the program that serves MCP over stdio, such as python"
    for field in ("num_processes", "max_concurrency"):
        if getattr(server, field) < 1:
            yield f"{path}.{field}={getattr(server, field)}: must be at least 1"
    for field in ("start_timeout_s", "call_timeout_s"):
        if getattr(server, field) <= 0:
            yield f"{path}.{field}={getattr(server, field)}: must be greater than 0"
    for variable in server.env:
        # The value is left out on purpose: it may be the secret itself.
        if _SECRET_NAME.search(variable):
            yield (
                f"{path}.env.{variable}: looks like a secret, and the configuration is written to "
                f"disk; export {variable} and name it in {path}.env_from"
            )
