"""Asks programs with a deadline. What they do to themselves (crash, hang) is only an answer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_MARK = "@@matpo "
_SHOWN_CHARS = 300
_HEAD = f"""
import json
def tell(**values):
    print({_MARK!r} + json.dumps(values), flush=True)
"""


@dataclass(frozen=True)
class Answer:
    """How a program ended."""

    problem: str
    """Empty if it ended with code 0."""
    output: str = ""
    """stdout."""
    told: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What a Python child said with `tell`, before it ended or was killed."""
    seconds: float = 0.0
    """How long it ran."""


def ask(
    argv: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None, cwd: str = ""
) -> Answer:
    """Run a program in a session of its own; on return none of the session is left.

    `env` is added to this process's environment.
    """
    # Files, not pipes: a grandchild that keeps a pipe open would be waited for.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | dict(env or {}),
                cwd=cwd or None,
                start_new_session=True,
            )
        except OSError as error:
            return Answer(f"{argv[0]}: {error.strerror or error}")
        start = time.monotonic()
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for file in (out, err):
            file.seek(0)
        output, errors = out.read(), err.read()
        seconds = time.monotonic() - start
    problem = "" if code == 0 else _problem(code, errors or output, seconds)
    return Answer(problem, output, _told(output), seconds)


def ask_python(
    python: str, code: str, timeout_s: float, env: Mapping[str, str] | None = None
) -> Answer:
    """Run `code`, which may call `tell(key=value, ...)`, in `python`.

    It starts in the root folder: names of the current one must not shadow packages.
    """
    python = os.path.abspath(python) if os.sep in python else python
    return ask([python, "-c", _HEAD + code], timeout_s, env, cwd="/")


def _told(output: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith(_MARK):
            told |= json.loads(line.removeprefix(_MARK))
    return told


def _problem(code: int | None, errors: str, seconds: float) -> str:
    if code is None:
        return f"no answer in {seconds:.0f} s"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = lines[-1][:_SHOWN_CHARS] if lines else "no message"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}: {last}"
    return last
