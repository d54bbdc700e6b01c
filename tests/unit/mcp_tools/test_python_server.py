"""The Python server as a process: its command line, the protocol, and its end.

The pool is the real client. What the sandbox holds is proven in test_sandbox_child.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_matpo.agents.tools import ToolReply
from megatron_matpo.config.tools import McpServerConfig, ToolsConfig
from megatron_matpo.errors import ToolError
from megatron_matpo.mcp_tools import python_server
from megatron_matpo.mcp_tools.pool import McpToolBox
from megatron_matpo.mcp_tools.python_sandbox import Isolation, find_isolation
from tests.helpers.rogue import with_box

MODULE = "megatron_matpo.mcp_tools.python_server"
needs_isolation = pytest.mark.skipif(
    bool(find_isolation().missing), reason="; ".join(find_isolation().missing)
)


def server(*arguments: str) -> McpServerConfig:
    return McpServerConfig("python", args=["-m", MODULE, *arguments], start_timeout_s=60)


def start(*arguments: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", MODULE, *arguments]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


def ask(process: subprocess.Popen[bytes], code: str) -> None:
    assert process.stdin is not None
    params = {"name": "run_python", "arguments": {"code": code}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    process.stdin.write(json.dumps(message).encode() + b"\n")
    process.stdin.flush()


def child_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The process of the running call, once it runs code."""
    end = time.monotonic() + 30
    while True:
        assert time.monotonic() < end
        for child in psutil.Process(process.pid).children():
            # The child of the server's own trial may end while it is looked at.
            with contextlib.suppress(psutil.Error, OSError):
                if "matpo-sandbox" in child.cwd() and list(Path(child.cwd()).iterdir()):
                    return child
        time.sleep(0.02)


def wait_gone(process: psutil.Process) -> None:
    end = time.monotonic() + 10
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.02)


@needs_isolation
def test_through_the_pool(tmp_path: Path) -> None:
    async def body(box: McpToolBox) -> None:
        (spec,) = box.specs()
        assert (spec.server, spec.name) == ("a", "run_python")
        assert spec.input_schema["required"] == ["code"]
        assert await box.call("a", "run_python", {"code": "6 * 7"}) == ToolReply("42", False)
        failed = await box.call("a", "run_python", {"code": "1 / 0"})
        assert failed.is_error and failed.text.endswith("ZeroDivisionError: division by zero")
        empty = await box.call("a", "run_python", {"code": " "})
        assert empty.is_error and "non-empty string" in empty.text
        unknown = await box.call("a", "calculate", {"code": "1"})
        assert unknown.is_error and "there are: run_python" in unknown.text
        odd = await box.call("a", "run_python", {"code": "'\\ud800'\nprint('\\u2028 é')"})
        assert odd == ToolReply("\u2028 é", False)

    with_box(tmp_path, {"a": server()}, body)


@needs_isolation
def test_at_most_so_many_calls_run_at_once_and_all_are_answered(tmp_path: Path) -> None:
    most = 0

    async def body(box: McpToolBox) -> None:
        nonlocal most
        (pid,) = box.pids()
        code = "import time; time.sleep(0.3); {0}"
        calls = [box.call("a", "run_python", {"code": code.format(n)}) for n in range(9)]
        pending = asyncio.gather(*calls)
        while not pending.done():
            most = max(most, len(psutil.Process(pid).children()))
            await asyncio.sleep(0.01)
        assert [reply.text for reply in await pending] == [str(n) for n in range(9)]

    with_box(tmp_path, {"a": server("--max-concurrency", "3")}, body)
    assert most == 3


@needs_isolation
def test_limits_come_from_the_command_line(tmp_path: Path) -> None:
    async def body(box: McpToolBox) -> None:
        slow = await box.call("a", "run_python", {"code": "import time; time.sleep(60)"})
        assert slow.is_error and "more than 1.5 s" in slow.text
        loud = await box.call("a", "run_python", {"code": "'x' * 100"})
        assert "[... cut: the first 10 characters are shown]" in loud.text

    arguments = ["--timeout-s", "1.5", "--max-output-chars", "10"]
    with_box(tmp_path, {"a": server(*arguments)}, body)


@needs_isolation
@pytest.mark.parametrize("how", ["stdin ends", "SIGTERM"])
def test_the_end_of_the_server_is_the_end_of_its_calls(how: str) -> None:
    process = start("--timeout-s", "100")
    ask(process, "open('here', 'w'); import time; time.sleep(90)")
    child = child_of(process)
    scratch = Path(child.cwd())
    if how == "stdin ends":
        assert process.stdin is not None
        process.stdin.close()
    else:
        process.send_signal(signal.SIGTERM)
    process.wait(30)
    wait_gone(child)
    assert not scratch.exists() and not scratch.parent.exists()
    assert process.stdout is not None and process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.stdout.close()
    process.stderr.close()


@needs_isolation
def test_a_killed_server_takes_its_calls_along() -> None:
    process = start("--timeout-s", "100")
    ask(process, "import time; open('here', 'w'); time.sleep(90)")
    child = child_of(process)
    process.kill()
    process.communicate()
    wait_gone(child)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--timeout-s", "0"], "must be above 0"),
        (["--memory-mb", "-1"], "must be at least 1"),
        (["--max-concurrency", "many"], "invalid"),
    ],
)
def test_bad_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        python_server.main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_without_isolation_it_does_not_start_unless_told_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel without seccomp and Landlock is played by saying so."""
    nothing = Isolation(seccomp=False, landlock=0)
    monkeypatch.setattr(python_server, "find_isolation", lambda: nothing)
    assert python_server.main([]) == 2
    said = capsys.readouterr().err
    assert "no seccomp filter" in said and "no Landlock" in said and "--allow-unsafe" in said
    sandbox = python_server.open_sandbox(python_server.parse_arguments(["--allow-unsafe"]))
    assert sandbox is not None
    assert sandbox.run("6 * 7").text == "42"
    sandbox.close()
    assert "going on, because of --allow-unsafe" in capsys.readouterr().err


@needs_isolation
def test_a_sandbox_that_does_not_hold_is_found_at_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A filter that lets everything through is played by an empty one."""
    allow_all = (0x06).to_bytes(2, "little") + bytes(2) + (0x7FFF0000).to_bytes(4, "little")
    monkeypatch.setattr(
        "megatron_matpo.mcp_tools.python_sandbox.build_filter", lambda may_write: allow_all
    )
    assert python_server.main(["--allow-unsafe"]) == 2
    assert "the sandbox does not hold" in capsys.readouterr().err


@needs_isolation
def test_the_run_stops_with_the_reason_when_the_server_cannot_start(tmp_path: Path) -> None:
    async def run() -> None:
        config = ToolsConfig({"python": server("--memory-mb", "x")})
        with pytest.raises(ToolError, match="--memory-mb"):
            await McpToolBox(config, tmp_path).start()

    before = set(psutil.Process().children())
    asyncio.run(run())
    assert not [item for item in psutil.Process().children() if item not in before]
