"""An MCP server over stdin and stdout for tools that take their time: calls run in threads.

The protocol (JSON-RPC 2.0, one object per line) is spoken here directly, because importing the SDK
would take ten times as long as everything else. What is not a call is answered at once, also while
all threads are busy. The server ends when stdin ends or nobody reads its replies.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from megatron_matpo.mcp_tools.corpus_server import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    PROTOCOL_VERSIONS,
    ArgumentError,
)

INTERNAL_ERROR = -32603


class OutageError(RuntimeError):
    """The server itself failed: the model must not see it, the call is to be retried."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model reads."""

    text: str
    is_error: bool = False


Tool = Callable[[Mapping[str, Any]], Reply]
"""Arguments -> reply; may raise ArgumentError (for the model) and OutageError."""


class StdioServer:
    """Answers lines of JSON-RPC with the replies of some tools."""

    def __init__(
        self,
        name: str,
        schemas: Sequence[Mapping[str, Any]],
        tools: Mapping[str, Tool],
        max_concurrency: int,
    ) -> None:
        """`schemas` are what `tools/list` says of `tools`; names must agree."""
        assert {schema["name"] for schema in schemas} == set(tools), "every tool has its schema"
        self._name = name
        self._schemas = list(schemas)
        self._tools = tools
        self._max_concurrency = max_concurrency
        self._lock = threading.Lock()

    def serve(self, source: BinaryIO, sink: BinaryIO) -> None:
        """Answer each line of `source` until it ends; calls that wait then are dropped."""
        pool = ThreadPoolExecutor(self._max_concurrency, thread_name_prefix="call")
        try:
            for line in source:
                if line.strip():
                    self._take(line, sink, pool)
        except BrokenPipeError:
            return
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def run(self, close: Callable[[], None] = lambda: None) -> NoReturn:
        """Serve stdin and stdout, then end the process at once, also on SIGTERM.

        Calls that still run have nobody to answer, and an interpreter would wait for their threads.

        Args:
            close: what is to be done before the end.
        """
        signal.signal(signal.SIGTERM, _stop)
        status = 0
        try:
            self.serve(sys.stdin.buffer, sys.stdout.buffer)
        except (KeyboardInterrupt, SystemExit):
            status = 130
        except Exception:
            traceback.print_exc()
            status = 1
        close()
        sys.stderr.flush()
        os._exit(status)

    def _take(self, line: bytes, sink: BinaryIO, pool: ThreadPoolExecutor) -> None:
        try:
            message: Any = json.loads(line)
        except ValueError as error:
            self._send(sink, _error(None, PARSE_ERROR, f"Parse error: {error}"))
            return
        if not isinstance(message, dict):
            self._send(sink, _error(None, INVALID_REQUEST, "Expected one JSON-RPC object per line"))
            return
        method, params, identity = message.get("method"), message.get("params"), message.get("id")
        if identity is None or "method" not in message:
            return
        if not isinstance(method, str) or not isinstance(params, dict | None):
            self._send(sink, _error(identity, INVALID_REQUEST, "Invalid request"))
        elif method == "tools/call":
            pool.submit(self._call, params or {}, identity, sink)
        else:
            self._send(sink, self._handle(method, params or {}, identity))

    def _handle(self, method: str, params: dict[str, Any], identity: Any) -> dict[str, Any]:
        if method == "tools/list":
            result: dict[str, Any] = {"tools": self._schemas}
        elif method == "initialize":
            asked = params.get("protocolVersion")
            result = {
                "protocolVersion": asked if asked in PROTOCOL_VERSIONS else PROTOCOL_VERSIONS[0],
                "capabilities": {"tools": {}},
                "serverInfo": {"name": self._name, "version": "1"},
            }
        elif method == "ping":
            result = {}
        else:
            return _error(identity, METHOD_NOT_FOUND, f"Method not found: {method}")
        return {"jsonrpc": "2.0", "id": identity, "result": result}

    def _call(self, params: dict[str, Any], identity: Any, sink: BinaryIO) -> None:
        try:
            self._send(sink, self._answer(params, identity))
        except BrokenPipeError:
            return  # nobody waits for it any more; the reader finds out by itself

    def _answer(self, params: dict[str, Any], identity: Any) -> dict[str, Any]:
        name, arguments = params.get("name"), params.get("arguments") or {}
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return _error(
                identity, INVALID_PARAMS, "tools/call needs a name and an arguments object"
            )
        tool = self._tools.get(name)
        if tool is None:
            known = ", ".join(self._tools)
            return _error(identity, INVALID_PARAMS, f"Unknown tool {name!r}; there are: {known}")
        try:
            reply = tool(arguments)
        except ArgumentError as error:
            reply = Reply(f"Error: {error}", is_error=True)
        except OutageError as error:
            # The client knows by these words that the model is not to blame (mcp_tools/pool.py).
            return _error(identity, INTERNAL_ERROR, f"service unavailable: {error}")
        content = [{"type": "text", "text": reply.text}]
        result = {"content": content, "isError": reply.is_error}
        return {"jsonrpc": "2.0", "id": identity, "result": result}

    def _send(self, sink: BinaryIO, message: dict[str, Any]) -> None:
        # ASCII: a lone surrogate in a reply has no UTF-8 form.
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            sink.write(line)
            sink.flush()


def text_argument(arguments: Mapping[str, Any], name: str) -> str:
    """The non-empty text `arguments[name]`.

    Raises:
        ArgumentError: there is none.
    """
    value = arguments.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ArgumentError(f"argument {name!r} is required and must be a non-empty string")
    return value


def positive_int(text: str) -> int:
    """Command line: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_float(text: str) -> float:
    """Command line: a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _stop(_signal: int, _frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end is under way
    raise SystemExit


def _error(identity: Any, code: int, message: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": identity, "error": {"code": code, "message": message}}
