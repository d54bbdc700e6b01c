"""How the processes of a tool server are started: command, environment, end with the parent.

Values of variables named in `env_from` are secrets: they go into the child's environment and
nowhere else, and `redact` takes them out of any text of the server's that is shown.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_matpo.config.tools import McpServerConfig
from megatron_matpo.errors import ToolError

_INHERITED_TEXT = (
    "PATH HOME USER LOGNAME SHELL TERM TMPDIR LANG LC_ALL LC_CTYPE TZ PYTHONPATH"
    " SSL_CERT_FILE SSL_CERT_DIR NODE_EXTRA_CA_CERTS"
    " HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY http_proxy https_proxy no_proxy all_proxy"
)
INHERITED = tuple(_INHERITED_TEXT.split())
"""Variables that every server gets if they are set; all others must be named in the recipe."""

STDERR_TAIL_LINES = 8
_STDERR_TAIL_BYTES = 8192
_PR_SET_PDEATHSIG = 1
# Loaded here and not between fork and exec, where only the plainest calls are safe.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything that is needed to start one process of a server."""

    server: str
    index: int
    """Which of the server's `num_processes`."""
    argv: tuple[str, ...]
    log_path: Path
    """Receives the process's stderr, appended."""
    env: Mapping[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """For messages: `tool server 'search' (process 0)`."""
        return f"tool server {self.server!r} (process {self.index})"

    def describe(self, log_offset: int = 0) -> str:
        """Command, log file and last stderr lines written since `log_offset`, for an error."""
        lines = stderr_tail(self.log_path, log_offset)
        tail = "\n".join(f"  | {line}" for line in lines) if lines else "  | (nothing)"
        return self.redact(
            f"command: {shlex.join(self.argv)}\nlast lines of its stderr ({self.log_path}):\n{tail}"
        )

    def redact(self, text: str) -> str:
        """`text` without the values of `env_from` variables."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def plan_launch(server: str, index: int, config: McpServerConfig, log_dir: Path) -> Launch:
    """The launch of process `index` of `server`.

    Raises:
        ToolError: no command, or a variable of `env_from` is not set (it is named).
    """
    if not config.command:
        raise ToolError(f"tools.servers.{server}.command is empty")
    missing = [name for name in config.env_from if name not in os.environ]
    if missing:
        raise ToolError(
            f"tools.servers.{server}.env_from names {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not set in the environment of this run: "
            f"export {missing[0]}=... before starting it"
        )
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    handed = {name: os.environ[name] for name in config.env_from}
    command = sys.executable if config.command == "python" else config.command
    # A server's name comes from the recipe and may hold anything; its log file's must not.
    file_name = f"tool-{re.sub(r'[^A-Za-z0-9_.-]', '_', server)}-{index}.log"
    return Launch(
        server=server,
        index=index,
        argv=(command, *config.args),
        log_path=log_dir / file_name,
        env=inherited | dict(config.env) | handed,
        # The longest first: a shorter one may be its beginning.
        secrets=tuple(sorted((v for v in handed.values() if len(v) >= 4), key=len, reverse=True)),
    )


def stderr_tail(path: Path, offset: int = 0) -> list[str]:
    """The last non-empty lines of a log file, as far as they were written after `offset` bytes."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset, size - _STDERR_TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rstrip()[:500] for line in text.splitlines()]
    return [line for line in lines if line][-STDERR_TAIL_LINES:]


def end_with_parent() -> None:
    """Between fork and exec: ask Linux to end this process when its parent dies.

    It is the second line of defence. The first is that stdin ends with the parent, which ends
    every server that reads it, but not one that hangs.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def exit_text(returncode: int | None) -> str:
    """`exited with code 3`, `was ended by SIGSEGV`, ..."""
    if returncode is None:
        return "closed its stdout"
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was ended by signal {-returncode}"
