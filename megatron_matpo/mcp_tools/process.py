"""One server process and the byte stream to it: newline-delimited JSON-RPC over stdio.

The SDK's own stdio transport hides the process (no exit code, no pid, no say in how it is started)
and reads a long line in quadratic time, so this is a transport of our own under its session.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import math
import os
import signal
import subprocess
from types import TracebackType
from typing import Any, Self

import anyio
from mcp.shared.exceptions import MCPError
from mcp.shared.message import SessionMessage
from mcp_types import CONNECTION_CLOSED, jsonrpc_message_adapter

from megatron_matpo.errors import ToolError
from megatron_matpo.mcp_tools.launch import Launch, end_with_parent, exit_text

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is taken for garbage: the process is ended."""
GARBAGE_GRACE_S = 4.0
"""Before its first message a server may print a banner on stdout, but must then speak."""
EXIT_GRACE_S = 2.0
"""Between closing stdin, SIGTERM and SIGKILL."""
_READ_BYTES = 2**18
_LONGEST_HELD_CHARS = 4096
"""Of a line of stderr without end; a secret is shorter."""


class _WriteStream:
    """The session's way to the process's stdin, without a queue and a task between them.

    Messages of the same turn of the event loop leave in one system call.
    """

    def __init__(self, stdin: asyncio.StreamWriter) -> None:
        self._stdin = stdin
        self._lines: list[bytes] = []

    async def send(self, item: SessionMessage, /) -> None:
        message = item.message.model_dump(by_alias=True, exclude_unset=True, mode="json")
        if not self._lines:
            asyncio.get_running_loop().call_soon(self._flush)
        # json.dumps escapes line breaks, so that a line is a message.
        self._lines.append(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        try:
            await self._stdin.drain()
        except (ConnectionError, RuntimeError) as error:
            raise anyio.BrokenResourceError from error

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        if not self._stdin.is_closing():
            self._stdin.writelines(lines)

    async def aclose(self) -> None:
        self._stdin.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.aclose()


class ServerProcess:
    """A running process. `ended` is set when no further message can come from it."""

    def __init__(self, launch: Launch, process: asyncio.subprocess.Process, offset: int) -> None:
        """Use `spawn`."""
        assert process.stdin is not None and process.stdout is not None
        self.launch = launch
        self.ended = asyncio.Event()
        self.fault = ""
        """Why we gave up on it; empty if it ended by itself."""
        self._log_offset = offset
        self._process = process
        self._stdout = process.stdout
        self._stdin = process.stdin
        self._spoke = False
        self._garbage_timer: asyncio.TimerHandle | None = None
        self._inbox, self.read_stream = anyio.create_memory_object_stream[
            SessionMessage | Exception
        ](math.inf)
        self.write_stream = _WriteStream(process.stdin)
        self._reader = asyncio.create_task(self._read(), name=f"read {launch.name}")
        self._logger: asyncio.Task[None] | None = None
        if process.stderr is not None:
            copying = _copy_redacted(process.stderr, launch)
            self._logger = asyncio.create_task(copying, name=f"log {launch.name}")

    @classmethod
    async def spawn(cls, launch: Launch) -> ServerProcess:
        """Start the process.

        Raises:
            ToolError: the program cannot be started.
        """
        try:
            launch.log_path.parent.mkdir(parents=True, exist_ok=True)
            with launch.log_path.open("ab") as log:
                offset = log.tell()
                process = await asyncio.create_subprocess_exec(
                    *launch.argv,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    # What may quote a secret goes through us; all else straight into the file.
                    stderr=asyncio.subprocess.PIPE if launch.secrets else log,
                    env=dict(launch.env),
                    limit=2 * _READ_BYTES,
                    # A group of its own: Ctrl-C reaches us first, and `stop` reaches children.
                    process_group=0,
                    preexec_fn=end_with_parent,
                )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reason = "no such program" if isinstance(error, FileNotFoundError) else str(error)
            raise ToolError(
                f"{launch.name} cannot be started: {reason}: {launch.argv[0]!r}\n"
                + launch.describe()
            ) from error
        return cls(launch, process, offset)

    @property
    def pid(self) -> int:
        """Process id; also the id of its process group."""
        return self._process.pid

    def give_up(self, fault: str) -> None:
        """Take the process for lost: calls in flight end as if the connection had broken."""
        if not self.ended.is_set():
            self.fault = fault
            self._reader.cancel()

    def end_text(self) -> str:
        """Why the process is no longer usable, with the last lines of its stderr."""
        reason = self.fault or exit_text(self._process.returncode)
        return f"{self.launch.redact(reason)}\n{self.launch.describe(self._log_offset)}"

    def lost_text(self, error: MCPError) -> str:
        """What happened if `error` came of the end of the process; empty if the server said it."""
        # Servers use the same code for errors of their own.
        is_ours = error.code == CONNECTION_CLOSED and self.ended.is_set()
        return self.end_text() if is_ours else ""

    async def stop(self) -> None:
        """Close stdin, wait, SIGTERM, wait, SIGKILL; then no process of its group is left."""
        self._cancel_timer()
        with contextlib.suppress(OSError, RuntimeError):
            self._stdin.close()
        try:
            if self.fault or not await self._exits(EXIT_GRACE_S):
                self._signal(signal.SIGTERM)
                await self._exits(EXIT_GRACE_S)
        finally:
            # Also when cancelled, and also for children that outlived their parent.
            self._signal(signal.SIGKILL)
            self._reader.cancel()
            self._inbox.close()
            self.read_stream.close()
        await self._exits(EXIT_GRACE_S)
        await asyncio.wait([self._reader])
        if self._logger is not None:
            # It ends with the last process that holds stderr, which may have left the group.
            await asyncio.wait([self._logger], timeout=EXIT_GRACE_S)
            self._logger.cancel()
            await asyncio.wait([self._logger])

    async def _exits(self, timeout_s: float) -> bool:
        # Not Process.wait() alone: it also waits for the pipes, which a grandchild may hold.
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._process.returncode is None:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), min(left, 0.1))
        return True

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def _read(self) -> None:
        parts: list[bytes] = []
        size = 0
        try:
            while chunk := await self._stdout.read(_READ_BYTES):
                first, *rest = chunk.split(b"\n")
                parts.append(first)
                size += len(first)
                for line in rest:
                    self._receive(b"".join(parts))
                    parts, size = [line], len(line)
                if size > MAX_LINE_BYTES:
                    self.fault = f"wrote a line of more than {MAX_LINE_BYTES >> 20} MiB on stdout"
                    break
            else:
                with contextlib.suppress(TimeoutError):  # the exit code follows the end of stdout
                    await asyncio.wait_for(self._process.wait(), 0.5)
        finally:
            self._cancel_timer()
            self.ended.set()
            self._inbox.close()

    def _receive(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            message = parse_message(line)
        except ValueError:
            if not self._spoke and self._garbage_timer is None:
                shown = line[:80].decode("utf-8", "replace")
                fault = f"does not speak MCP: it wrote {shown!r} on stdout"
                loop = asyncio.get_running_loop()
                self._garbage_timer = loop.call_later(GARBAGE_GRACE_S, self.give_up, fault)
            return
        self._spoke = True
        self._cancel_timer()
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            self._inbox.send_nowait(SessionMessage(message))

    def _cancel_timer(self) -> None:
        if self._garbage_timer is not None:
            self._garbage_timer.cancel()


async def _copy_redacted(stderr: asyncio.StreamReader, launch: Launch) -> None:
    """Append what the process writes to its log, line by line, without the values of secrets."""
    with launch.log_path.open("ab", buffering=0) as log:
        rest = ""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while chunk := await stderr.read(_READ_BYTES):
            # Redacted before it is split, so that what is held back holds no end of a secret.
            text = launch.redact(rest + decoder.decode(chunk))
            end = max(text.rfind("\n") + 1, len(text) - _LONGEST_HELD_CHARS)
            log.write(text[:end].encode("utf-8", "replace"))
            rest = text[end:]
        log.write(launch.redact(rest).encode("utf-8", "replace"))


def parse_message(line: bytes) -> Any:
    """One JSON-RPC message.

    JavaScript servers cut text in the middle of surrogate pairs and send the halves, which strict
    parsers refuse; here such a half becomes a question mark.

    Raises:
        ValueError: not a JSON-RPC message.
    """
    try:
        return jsonrpc_message_adapter.validate_json(line, by_name=False)
    except ValueError:
        if b"\\ud" not in line.lower():
            raise
    return jsonrpc_message_adapter.validate_python(_clean(json.loads(line)), by_name=False)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value


def clean_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` as they are, or without lone surrogates, which the SDK cannot serialise."""
    try:
        json.dumps(arguments, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return _clean(arguments)
    return arguments
