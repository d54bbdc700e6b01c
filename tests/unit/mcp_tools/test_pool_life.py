"""How servers of the pool begin and end: failing starts are named, and nothing survives a close."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_matpo.config.tools import McpServerConfig, ToolsConfig
from megatron_matpo.errors import ToolError
from megatron_matpo.mcp_tools import process
from megatron_matpo.mcp_tools.pool import McpToolBox
from tests.helpers.rogue import ROGUE, failing_start, rogue, with_box


def test_a_server_that_exits_at_start(tmp_path: Path) -> None:
    message, took_s = failing_start(tmp_path, rogue("exit"))
    assert "did not start: it exited with code 3" in message
    assert f"{ROGUE} exit" in message and "cannot find my configuration" in message
    assert took_s < 5.0


def test_a_server_that_speaks_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GARBAGE_GRACE_S", 0.3)
    message, took_s = failing_start(tmp_path, rogue("garbage"))
    assert "does not speak MCP: it wrote '<html>this is not a protocol</html>'" in message
    assert took_s < 5.0


def test_a_server_that_never_answers_at_start(tmp_path: Path) -> None:
    message, took_s = failing_start(tmp_path, rogue("mute", start_timeout_s=0.5))
    assert "did not start within tools.servers.web.start_timeout_s = 0.5 s" in message
    assert took_s < 6.0


def test_a_missing_program(tmp_path: Path) -> None:
    message, _ = failing_start(tmp_path, McpServerConfig("no-such-program-here", ["--x"]))
    assert "no such program: 'no-such-program-here'" in message
    assert "no-such-program-here --x" in message


def test_one_bad_server_stops_the_others(tmp_path: Path) -> None:
    async def run() -> None:
        box = McpToolBox(ToolsConfig({"good": rogue(), "web": rogue("exit")}), tmp_path)
        with pytest.raises(ToolError, match="'web'"):
            await box.start()
        assert box.pids() == []

    asyncio.run(run())
    assert not [item for item in psutil.Process().children() if ROGUE in item.cmdline()]


def test_the_environment_is_minimal_and_secrets_stay_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_SECRET", "sesame-open")
    monkeypatch.setenv("UNRELATED", "1")
    monkeypatch.setenv("https_proxy", "http://proxy:1")
    caplog.set_level("DEBUG")

    async def body(box: McpToolBox) -> None:
        env = json.loads((await box.call("a", "env", {})).text)
        # The server has it, but what it says about it goes no further.
        assert env["MY_SECRET"] == "***"
        assert env["PLAIN"] == "value"
        assert env["https_proxy"] == "http://proxy:1"
        assert "UNRELATED" not in env and "PATH" in env

    config = rogue(env={"PLAIN": "value"}, env_from=["MY_SECRET"])
    with_box(tmp_path, {"a": config}, body)
    shown = rogue("exit", "sesame-open", env_from=["MY_SECRET"])
    message, _ = failing_start(tmp_path, shown)
    assert "sesame-open" not in message + caplog.text


def test_a_variable_that_is_not_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"tools\.servers\.a\.env_from names NO_SUCH_KEY, which is"):
        McpToolBox(ToolsConfig({"a": rogue(env_from=["PATH", "NO_SUCH_KEY"])}), tmp_path)


def test_close_kills_what_does_not_want_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "EXIT_GRACE_S", 0.3)

    async def body(box: McpToolBox) -> None:
        await box.call("a", "echo", {"text": "x"})

    with_box(tmp_path, {"a": rogue("stubborn", num_processes=2)}, body)


def test_close_ends_calls_in_flight_and_leaves_no_file_handle(tmp_path: Path) -> None:
    async def body(box: McpToolBox) -> None:
        call = asyncio.create_task(box.call("a", "sleep", {"seconds": 1}))
        await asyncio.sleep(0.1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await box.close()
        with pytest.raises(ToolError, match="tool server 'a' is closed"):
            await box.call("a", "echo", {})

    def handles() -> int:
        return psutil.Process().num_fds()

    with_box(tmp_path, {"a": rogue()}, body)
    before = handles()
    for _ in range(3):
        with_box(tmp_path, {"a": rogue(num_processes=2)}, body)
    assert handles() == before


CLIENT = """
import asyncio, sys
from megatron_matpo.config.tools import McpServerConfig, ToolsConfig
from megatron_matpo.mcp_tools.pool import McpToolBox

async def main():
    servers = {mode: McpServerConfig("python", [sys.argv[1], mode]) for mode in ("ok", "single")}
    async with McpToolBox(ToolsConfig(servers), sys.argv[2]) as box:
        call = asyncio.create_task(box.call("single", "sleep", {"seconds": 100}))
        await asyncio.sleep(0.3)
        print(*box.pids(), flush=True)
        await call

asyncio.run(main())
"""


def test_no_server_survives_a_killed_client(tmp_path: Path) -> None:
    """One server reads its stdin and sees its end; the other hangs, and gets the signal."""
    command = [sys.executable, "-c", CLIENT, ROGUE, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        pids = [int(word) for word in client.stdout.readline().split()]
        assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
        os.kill(client.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.05, 0.2])
def test_a_cancelled_start_leaves_nothing(tmp_path: Path, delay_s: float) -> None:
    async def run() -> None:
        box = McpToolBox(ToolsConfig({"a": rogue(), "b": rogue("mute")}), tmp_path)
        task = asyncio.create_task(box.start())
        await asyncio.sleep(delay_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(20):
                await task

    asyncio.run(run())
    assert not [item for item in psutil.Process().children() if ROGUE in item.cmdline()]
