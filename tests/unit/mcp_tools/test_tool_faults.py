"""Faults of tool servers, over stdio and HTTP, in real processes.

Proven: every call ends inside its deadline, as a reply or a `ToolError`; the server serves the next
call; afterwards no process, file handle or task is left. Deadlines here are short, and a call has
ended in time if it beat a far larger limit, so that a busy machine does not matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from megatron_matpo.agents.tools import ToolReply
from megatron_matpo.config.tools import McpServerConfig, ToolsConfig
from megatron_matpo.errors import ToolError
from megatron_matpo.mcp_tools import process, remote
from megatron_matpo.mcp_tools.pool import McpToolBox
from tests.helpers.http_servers import ROGUE_HTTP, HttpServer, http_server
from tests.helpers.rogue import rogue

DEADLINE_S = 1.0
FAR_LIMIT_S = 30.0


async def outcome(box: McpToolBox, tool: str, **arguments: object) -> ToolReply | ToolError:
    async with asyncio.timeout(FAR_LIMIT_S):
        try:
            return await box.call("web", tool, arguments)
        except ToolError as error:
            return error


def run_without_leak(
    config: McpServerConfig, tmp_path: Path, body: Callable[[McpToolBox], Awaitable[object]]
) -> None:
    """Run `body` twice; the second time leaves nothing behind that was not there before it."""

    async def run() -> None:
        async with McpToolBox(ToolsConfig({"web": config}), tmp_path) as box:
            await body(box)
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    asyncio.run(run())
    me = psutil.Process()
    before = (me.num_fds(), {child.pid for child in me.children(recursive=True)})
    asyncio.run(run())
    after = (me.num_fds(), {child.pid for child in me.children(recursive=True)})
    assert after == before


@pytest.mark.parametrize(
    ("tool", "arguments", "expected"),
    [
        ("sleep", {"seconds": 60}, "no answer within tools.servers.web.call_timeout_s = 1 s"),
        ("die", {}, "the server was lost: exited with code 7"),
        ("nonsense", {}, "the server broke the protocol"),
        ("outage", {}, "the service behind it failed: fetch failed"),
        ("babble", {}, "no answer within"),
        ("drip", {}, "no answer within"),
        ("flood", {}, "the server was lost: wrote a line of more than 1 MiB on stdout"),
        ("unasked", {}, ToolReply("after all", False)),
        ("big", {"chars": 900_000}, ToolReply("x" * 900_000, False)),
    ],
)
def test_over_stdio(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tool: str,
    arguments: dict[str, object],
    expected: str | ToolReply,
) -> None:
    monkeypatch.setattr(process, "MAX_LINE_BYTES", 2**20)
    monkeypatch.setattr(process, "EXIT_GRACE_S", 0.5)

    async def body(box: McpToolBox) -> None:
        found = await outcome(box, tool, **arguments)
        if isinstance(expected, ToolReply):
            assert found == expected
        else:
            assert isinstance(found, ToolError) and expected in str(found)
        assert await outcome(box, "echo", text="next") == ToolReply("next", False)

    settings = {"max_attempts": 2, "backoff_s": 0.05}
    is_slow = isinstance(expected, str) and "no answer" in expected
    deadline = {"call_timeout_s": DEADLINE_S} if is_slow else {}
    run_without_leak(rogue(**settings, **deadline), tmp_path, body)


@pytest.fixture(scope="module")
def rogue_http():
    with http_server(ROGUE_HTTP) as server:
        yield server


@pytest.mark.parametrize(
    ("tool", "expected"),
    [
        ("hang", "no answer within tools.servers.web.call_timeout_s = 1 s"),
        ("drip-json", "no answer within"),
        ("drip-sse", "no answer within"),
        ("flood-json", "2 attempts; the server was lost: broke off its reply: more than 1 MiB"),
        ("flood-sse", "2 attempts; the server was lost: SSE stream failed"),
        ("cut", "2 attempts; the server was lost: broke off its reply"),
        ("reset", "2 attempts; the server was lost: broke off its reply"),
        ("status-500", "answered with HTTP 500: <html>an error page</html>"),
        ("status-503", "answered with HTTP 503"),
        ("status-429", "answered with HTTP 429"),
        ("status-403", "answered with HTTP 403"),
        ("status-404", "2 attempts; the server was lost: forgot the session: HTTP 404"),
        ("garbage", ToolReply("Error: Failed to parse JSON", True)),
        ("html", ToolReply("Error: Unexpected content type: text/html", True)),
        ("empty", ToolReply("Error: server answered a request with 202 Accepted", True)),
        ("redirect", ToolReply("Error: Redirect to https://elsewhere.example/mcp not", True)),
        ("status-400", ToolReply("Error: Server returned an error response", True)),
        ("big-json", ToolReply("x" * 10_000_000, False)),
        ("big-sse", ToolReply("x" * 10_000_000, False)),
    ],
)
def test_over_http(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rogue_http: HttpServer,
    tool: str,
    expected: str | ToolReply,
) -> None:
    if tool.startswith("flood"):
        monkeypatch.setattr(remote, "MAX_BODY_BYTES", 2**20)

    async def body(box: McpToolBox) -> None:
        found = await outcome(box, tool)
        if isinstance(expected, ToolReply):
            assert isinstance(found, ToolReply) and found.is_error == expected.is_error
            assert found.text.startswith(expected.text)
        else:
            assert isinstance(found, ToolError) and expected in str(found)
        assert await outcome(box, "echo") == ToolReply("fine", False)

    is_slow = isinstance(expected, str) and "no answer" in expected
    deadline = {"call_timeout_s": DEADLINE_S} if is_slow else {}
    run_without_leak(rogue_http.config(max_attempts=2, backoff_s=0.05, **deadline), tmp_path, body)


def test_one_broken_request_does_not_disturb_the_others(
    tmp_path: Path, rogue_http: HttpServer
) -> None:
    async def body(box: McpToolBox) -> None:
        tools = ["reset", "cut", "garbage", "status-500", "big-json", *["echo"] * 20]
        found = await asyncio.gather(*(outcome(box, tool) for tool in tools))
        assert found[5:] == [ToolReply("fine", False)] * 20
        assert box.num_restarts == 0

    run_without_leak(rogue_http.config(max_attempts=2, max_concurrency=32), tmp_path, body)


def test_calls_that_are_cancelled_leave_nothing(tmp_path: Path, rogue_http: HttpServer) -> None:
    async def body(box: McpToolBox) -> None:
        tools = ("hang", "drip-json", "drip-sse")
        calls = [asyncio.create_task(outcome(box, tool)) for tool in tools]
        await asyncio.sleep(0.2)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert all(call.cancelled() for call in calls)

    run_without_leak(rogue_http.config(), tmp_path, body)


def test_requests_end_at_their_deadline_although_the_server_goes_on(
    tmp_path: Path, rogue_http: HttpServer
) -> None:
    async def body(box: McpToolBox) -> None:
        num_tasks = len(asyncio.all_tasks())
        tools = 3 * ("hang", "drip-json", "drip-sse")
        await asyncio.gather(*(outcome(box, tool) for tool in tools))
        async with asyncio.timeout(FAR_LIMIT_S):
            while len(asyncio.all_tasks()) > num_tasks:
                await asyncio.sleep(0.05)
        assert box.num_restarts == 0

    config = rogue_http.config(call_timeout_s=DEADLINE_S, max_attempts=1)
    run_without_leak(config, tmp_path, body)


@pytest.mark.parametrize("kind", ["stdio", "http"])
def test_a_burst_of_failures_opens_the_breaker_and_the_queue_fails_at_once(
    tmp_path: Path, rogue_http: HttpServer, kind: str
) -> None:
    """100 calls of 1 s each, two at a time, would take 50 s; with the breaker a few deadlines."""
    settings: dict[str, object] = {
        "call_timeout_s": 0.3,
        "max_concurrency": 2,
        "breaker_failures": 4,
        "breaker_reset_s": 60.0,
    }
    if kind == "stdio":
        config, tool, arguments = rogue(**settings), "sleep", {"seconds": 60}
    else:
        config, tool, arguments = rogue_http.config(**settings), "hang", {}

    async def body(box: McpToolBox) -> None:
        found = await asyncio.gather(*(outcome(box, tool, **arguments) for _ in range(100)))
        texts = [str(item) for item in found]
        num_refused = sum("not called, its circuit breaker is open" in text for text in texts)
        assert num_refused in (95, 96)
        assert all("no answer within" in text for text in texts)
        assert box.num_breaker_openings == 1

    run_without_leak(config, tmp_path, body)


def test_what_a_server_with_secrets_writes_to_stderr_is_redacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "sesame-open")

    async def body(box: McpToolBox) -> None:
        await outcome(box, "stderr", parts=["my key is ses", "ame-open\n", "x" * 300_000, "\nend"])

    run_without_leak(rogue(env_from=["KEY"]), tmp_path, body)
    text = (tmp_path / "tool-web-0.log").read_text()
    assert text.count("my key is ***\n" + "x" * 300_000 + "\nend") == 2
    assert "sesame" not in text
