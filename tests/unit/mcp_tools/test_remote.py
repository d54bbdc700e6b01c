"""Streamable HTTP against real servers in processes of their own: the SDK's, and a broken one.

Proven: calls, headers and their secrecy, a server that is killed and comes back, a session that is
forgotten, what counts as the tool's error. Faults are in `test_tool_faults.py`. Not proven: TLS and
proxies.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from megatron_matpo.agents.tools import ToolReply
from megatron_matpo.config.tools import McpServerConfig, ToolsConfig
from megatron_matpo.errors import ToolError
from megatron_matpo.mcp_tools.pool import McpToolBox
from megatron_matpo.ports import free_ports
from tests.helpers.http_servers import SDK, HttpServer, http_server
from tests.helpers.rogue import rogue, with_box


@pytest.mark.parametrize("mode", ["sse", "json"])
def test_calls_over_http(tmp_path: Path, mode: str) -> None:
    async def body(box: McpToolBox) -> None:
        assert box.specs()[0].input_schema["required"] == ["text"]
        naps = [box.call("web", "sleep", {"seconds": 0.2}) for _ in range(10)]
        texts = [f"line {i}\n\u2028 é 🎉" for i in range(40)]
        echoes = [box.call("web", "echo", {"text": text}) for text in texts]
        replies = await asyncio.gather(*naps, *echoes)
        assert [reply.text for reply in replies] == ["slept 0.2"] * 10 + texts
        assert (await box.call("web", "echo", {"text": "half \ud83d"})).text == "half ?"
        assert (await box.call("web", "big", {"chars": 10_000_000})).text == "x" * 10_000_000
        failed = await box.call("web", "fail", {})
        assert failed.is_error and "no such page" in failed.text
        wrong = await box.call("web", "echo", {"words": 1})
        assert wrong.is_error and "text" in wrong.text
        unknown = await box.call("web", "no_such_tool", {})
        assert unknown.is_error and "no_such_tool" in unknown.text
        assert box.pids() == [] and box.num_restarts == 0

    with http_server(SDK, mode) as server:
        with_box(tmp_path, {"web": server.config(max_concurrency=64, num_processes=2)}, body)


def test_servers_of_both_kinds_in_one_run(tmp_path: Path) -> None:
    async def body(box: McpToolBox) -> None:
        assert {spec.server for spec in box.specs()} == {"near", "far"}
        for name in ("near", "far"):
            assert await box.call(name, "echo", {"text": name}) == ToolReply(name, False)

    with http_server(SDK, "sse") as server:
        with_box(tmp_path, {"near": rogue(), "far": server.config()}, body)


def test_headers_carry_secrets_which_go_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("MY_KEY", "Bearer sesame-open")
    headers = {"X-Api-Key": "MY_KEY"}

    async def body(box: McpToolBox) -> None:
        assert (await box.call("web", "key", {})).text == "your key is ***"
        part = await box.call("web", "echo", {"text": "sesame-open"})
        assert part.text == "***"

    async def refused(config: McpServerConfig) -> str:
        with pytest.raises(ToolError) as caught:
            await McpToolBox(ToolsConfig({"web": config}), tmp_path).start()
        return str(caught.value)

    with http_server(SDK, "sse", EXPECTED="Bearer sesame-open") as server:
        with_box(tmp_path, {"web": server.config(headers_from=headers)}, body)
        monkeypatch.setenv("MY_KEY", "wrong-key")
        message = asyncio.run(refused(server.config(headers_from=headers)))
    assert "did not start: it answered with HTTP 401: who are you" in message
    assert f"tool server 'web' (http://127.0.0.1:{server.port}/mcp)" in message
    assert "wrong-key" not in message
    assert "sesame-open" not in caplog.text and "wrong-key" not in caplog.text
    monkeypatch.setenv("MY_KEY", "two\nlines")
    with pytest.raises(ToolError, match=r"headers_from\.X-Api-Key: the value of MY_KEY is no"):
        McpToolBox(ToolsConfig({"web": server.config(headers_from=headers)}), tmp_path)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ToolError, match=r"headers_from\.X-Api-Key names MY_KEY, which is not set"):
        McpToolBox(ToolsConfig({"web": server.config(headers_from=headers)}), tmp_path)


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    async def run() -> None:
        config = McpServerConfig(url=f"http://127.0.0.1:{free_ports('127.0.0.1', 1)[0]}/mcp")
        with pytest.raises(ToolError, match=r"'web' .* did not start: it cannot be reached"):
            await McpToolBox(ToolsConfig({"web": config}), tmp_path).start()
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["sse", "json"])
def test_a_server_that_is_killed_in_the_middle_and_comes_back(tmp_path: Path, mode: str) -> None:
    async def body(box: McpToolBox, server: HttpServer) -> None:
        before = (await box.call("web", "pid", {})).text
        sleeping = [asyncio.create_task(box.call("web", "sleep", {"seconds": 2})) for _ in range(3)]
        await asyncio.sleep(0.5)
        await asyncio.to_thread(server.kill)
        waiting = asyncio.create_task(box.call("web", "pid", {}))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(server.start)
        assert [reply.text for reply in await asyncio.gather(*sleeping)] == ["slept 2"] * 3
        after = (await waiting).text
        assert after not in ("", before)
        assert box.num_restarts >= 1

    with http_server(SDK, mode) as server:
        config = server.config(max_attempts=10, breaker_failures=0)
        with_box(tmp_path, {"web": config}, lambda box: body(box, server))


def test_a_session_that_the_server_forgot_is_opened_again_without_loss(tmp_path: Path) -> None:
    """Killed and started while nobody calls: the next call meets a server without the session."""

    async def body(box: McpToolBox, server: HttpServer) -> None:
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        assert (await box.call("web", "echo", {"text": "again"})).text == "again"
        assert box.num_restarts == 1

    with http_server(SDK, "json") as server:
        with_box(tmp_path, {"web": server.config()}, lambda box: body(box, server))


def test_a_server_that_stays_away_fails_calls_and_the_breaker_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_matpo.mcp_tools.connection.MAX_QUICK_RESTARTS", 1)

    async def body(box: McpToolBox, server: HttpServer) -> None:
        await asyncio.to_thread(server.kill)
        for _ in range(2):
            with pytest.raises(ToolError, match=r"cannot be reached|keeps dying"):
                await box.call("web", "echo", {"text": "x"})
        with pytest.raises(ToolError, match="its circuit breaker is open for another") as caught:
            await box.call("web", "echo", {"text": "x"})
        assert r"tools.servers.web.breaker_failures = 2 calls in a row" in str(caught.value)
        assert box.num_breaker_openings == 1
        await asyncio.to_thread(server.start)
        for _ in range(200):
            try:
                assert (await box.call("web", "echo", {"text": "x"})).text == "x"
                break
            except ToolError:
                await asyncio.sleep(0.05)
        assert (await box.call("web", "echo", {"text": "closed"})).text == "closed"

    with http_server(SDK, "json") as server:
        config = server.config(breaker_failures=2, breaker_reset_s=0.3)
        with_box(tmp_path, {"web": config}, lambda box: body(box, server))
