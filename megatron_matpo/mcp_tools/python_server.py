"""MCP server that runs Python code, each call in a sandbox of its own (`python_sandbox.py`).

    python -m megatron_matpo.mcp_tools.python_server --timeout-s 10 --memory-mb 512

At start the server tries the sandbox with code that it has to hold; where it does not hold, or the
kernel lacks what it needs, the server refuses to start unless told `--allow-unsafe`. A traceback is
an error reply that the model reads; a sandbox that cannot be set up is an outage that it never
sees.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from megatron_matpo.mcp_tools.python_sandbox import Sandbox, SandboxLimits, find_isolation
from megatron_matpo.mcp_tools.stdio import (
    OutageError,
    StdioServer,
    positive_float,
    positive_int,
    text_argument,
)

DESCRIPTION = "MCP server that runs Python code in a sandbox: run_python."
NAME = "megatron_matpo python"

TOOLS: list[dict[str, Any]] = [
    {
        "name": "run_python",
        "description": "Run Python code in a fresh sandbox without network or files of yours. "
        "Returns what it prints, and the value of its last line.",
        "inputSchema": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "Python 3 source code"}},
            "required": ["code"],
        },
    }
]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python_server", description=DESCRIPTION)
    default = SandboxLimits()
    add = parser.add_argument
    add("--cpu-seconds", type=positive_int, default=default.cpu_seconds, help="CPU time of a call")
    add("--memory-mb", type=positive_int, default=default.memory_mb, help="address space, MiB")
    add("--timeout-s", type=positive_float, default=default.timeout_s, help="wall clock of a call")
    add("--max-output-chars", type=positive_int, default=default.max_output_chars)
    add("--max-code-chars", type=positive_int, default=default.max_code_chars)
    add("--file-mb", type=positive_int, default=default.file_mb, help="size of one file, MiB")
    add("--scratch-mb", type=positive_int, default=default.scratch_mb, help="all files, MiB")
    add("--open-files", type=positive_int, default=default.open_files)
    add(
        "--max-concurrency",
        type=positive_int,
        default=max(1, (os.cpu_count() or 2) // 2),
        help="calls that run at the same time; further ones wait",
    )
    add(
        "--readable",
        action="append",
        default=[],
        metavar="PATH",
        help="a file or folder that code may read; folders can be imported from (repeatable)",
    )
    add(
        "--allow-unsafe",
        action="store_true",
        help="start even where the sandbox cannot hold what it promises",
    )
    return parser.parse_args(argv)


def open_sandbox(options: argparse.Namespace) -> Sandbox | None:
    """The sandbox, tried out; None if it does not hold, with the reason on stderr."""
    limits = SandboxLimits(
        cpu_seconds=options.cpu_seconds,
        memory_mb=options.memory_mb,
        timeout_s=options.timeout_s,
        max_output_chars=options.max_output_chars,
        max_code_chars=options.max_code_chars,
        file_mb=options.file_mb,
        scratch_mb=options.scratch_mb,
        open_files=options.open_files,
    )
    isolation = find_isolation()
    problems = list(isolation.missing)
    if problems and not options.allow_unsafe:
        _complain(problems, "use a newer kernel, or accept this with --allow-unsafe")
        return None
    sandbox = Sandbox(limits, isolation, options.readable)
    try:
        problem = sandbox.check()
    except OutageError as error:
        problem = str(error)
    if problem:
        _complain([problem], "raise the limits if they are very low; --allow-unsafe does not help")
        sandbox.close()
        return None
    if problems:
        _complain(problems, "going on, because of --allow-unsafe")
    return sandbox


def _complain(problems: list[str], advice: str) -> None:
    lines = "; ".join(problems)
    print(f"python_server: {lines}. {advice}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (2: the sandbox does not hold)."""
    options = parse_arguments(argv)
    sandbox = open_sandbox(options)
    if sandbox is None:
        return 2
    print("python_server: the sandbox holds", file=sys.stderr, flush=True)
    tools = {"run_python": lambda arguments: sandbox.run(text_argument(arguments, "code"))}
    StdioServer(NAME, TOOLS, tools, options.max_concurrency).run(sandbox.close)


if __name__ == "__main__":
    sys.exit(main())
