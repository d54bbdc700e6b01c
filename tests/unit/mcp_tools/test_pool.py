"""The pool against real stdio servers: the bundled one, and `rogue_server.py`, which misbehaves.

Proven: concurrency and order, deadlines with their names, restarts, what counts as the tool's error
and what as infrastructure, and that no process or file handle is left. Not proven: anything about
servers on the network.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import psutil
import pytest

from megatron_matpo.agents.tools import ToolReply
from megatron_matpo.config.tools import McpServerConfig
from megatron_matpo.errors import ToolError
from megatron_matpo.mcp_tools import process
from megatron_matpo.mcp_tools.pool import McpToolBox, is_outage
from tests.helpers.rogue import rogue, with_box


def test_the_bundled_server_end_to_end(tmp_path: Path) -> None:
    documents = tmp_path / "docs.jsonl"
    documents.write_text('{"url": "https://x.org/a", "title": "A", "text": "The bell is loud."}\n')
    config = McpServerConfig(
        "python",
        ["-m", "megatron_matpo.mcp_tools.corpus_server", "--documents", str(documents)],
    )

    async def body(box: McpToolBox) -> None:
        assert [(spec.server, spec.name) for spec in box.specs()] == [
            ("web", "google_search"),
            ("web", "scrape"),
        ]
        assert box.specs()[1].input_schema["required"] == ["url"]
        reply = await box.call("web", "google_search", {"q": "bell", "gl": "us", "hl": "en"})
        link = json.loads(reply.text)["organic"][0]["link"]
        page = await box.call("web", "scrape", {"url": link})
        assert json.loads(page.text)["text"] == "The bell is loud."
        bad = await box.call("web", "scrape", {"url": "https://other.org"})
        assert bad.is_error and "google_search" in bad.text
        unknown = await box.call("web", "no_such_tool", {})
        assert unknown.is_error and "no_such_tool" in unknown.text

    with_box(tmp_path, {"web": config}, body)


def test_many_calls_are_answered_in_parallel_and_each_by_its_own_reply(tmp_path: Path) -> None:
    async def body(box: McpToolBox) -> None:
        begin = time.perf_counter()
        naps = [box.call("a", "sleep", {"seconds": 0.3}) for _ in range(20)]
        echoes = [box.call("a", "echo", {"text": f"line {i}\n\u2028 é 🎉"}) for i in range(200)]
        replies = await asyncio.gather(*naps, *echoes)
        assert time.perf_counter() - begin < 5.0, "20 naps of 0.3 s one after another take 6 s"
        assert [reply.text for reply in replies[20:]] == [
            f"line {i}\n\u2028 é 🎉" for i in range(200)
        ]
        assert [spec.name for spec in box.specs()] == ["echo", "sleep", "die", "pid"], "both pages"

    with_box(tmp_path, {"a": rogue(max_concurrency=256)}, body)


def test_concurrency_is_bounded_and_spread_over_processes(tmp_path: Path) -> None:
    async def body(box: McpToolBox) -> None:
        assert len(box.pids()) == 2
        begin = time.perf_counter()
        await asyncio.gather(*(box.call("a", "sleep", {"seconds": 0.2}) for _ in range(8)))
        assert time.perf_counter() - begin >= 0.75, "8 calls, 2 at a time, 0.2 s each"
        replies = await asyncio.gather(*(box.call("a", "pid", {}) for _ in range(8)))
        assert {int(reply.text) for reply in replies} == set(box.pids())

    with_box(tmp_path, {"a": rogue(num_processes=2, max_concurrency=2)}, body)


def test_all_servers_start_at_the_same_time(tmp_path: Path) -> None:
    servers = {name: rogue("slow", "1.0") for name in "abcd"}
    begin = time.perf_counter()

    async def body(box: McpToolBox) -> None:
        assert time.perf_counter() - begin < 3.5, "one after another they take more than 4 s"

    with_box(tmp_path, servers, body)


@pytest.mark.parametrize(
    ("tool", "expected"),
    [
        ("refuse", ToolReply("Error: q is required", True)),
        ("code_of_closed", ToolReply("Error: my own error", True)),
        ("tool_error", ToolReply("no such page", True)),
        ("parts", ToolReply("one\n[image content is not shown]", False)),
        ("structured", ToolReply('{"a": 1}', False)),
        ("half_pair", ToolReply("cut ?", False)),
        ("noise", ToolReply("after noise", False)),
    ],
)
def test_what_a_tool_says_is_a_reply(tmp_path: Path, tool: str, expected: ToolReply) -> None:
    async def body(box: McpToolBox) -> None:
        assert await box.call("a", tool, {}) == expected

    with_box(tmp_path, {"a": rogue("banner")}, body)


def test_infrastructure_failures_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "sesame-open")

    async def body(box: McpToolBox) -> None:
        with pytest.raises(
            ToolError, match=r"3 attempts; the service behind it failed: fetch failed \*\*\*$"
        ):
            await box.call("a", "outage", {})
        with pytest.raises(ToolError, match="a/nonsense: the server broke the protocol"):
            await box.call("a", "nonsense", {})
        with pytest.raises(ToolError, match="no tool server is called 'b'"):
            await box.call("b", "echo", {})
        assert (await box.call("a", "echo", {"text": "fine"})).text == "fine"

    with_box(tmp_path, {"a": rogue(env_from=["KEY"])}, body)


def test_a_recipe_says_which_errors_of_a_server_are_outages(tmp_path: Path) -> None:
    async def body(box: McpToolBox) -> None:
        for tool, message in (("tool_error", "no such page"), ("refuse", "q is required")):
            failed = f"{tool}: 2 attempts; the service behind it failed: {message}"
            with pytest.raises(ToolError, match=failed):
                await box.call("strict", tool, {})
            assert (await box.call("plain", tool, {})).text.endswith(message)
        # What the error only quotes does not count.
        assert (await box.call("strict", "echo", {"text": "no such page"})).text == "no such page"

    pattern = "no such page|is required"
    strict = rogue(outage_pattern=pattern, max_attempts=2, backoff_s=0.01)
    with_box(tmp_path, {"strict": strict, "plain": rogue()}, body)


def test_a_query_that_speaks_of_outages_is_none() -> None:
    arguments = {"q": "fetch failed ECONNRESET", "hl": "en"}
    assert not is_outage("search for 'fetch failed ECONNRESET' failed: bad request", arguments)
    assert is_outage("search for 'x' failed: Not enough credits", {"q": "x", "hl": "en"})
    assert is_outage("search for 'fetch failed ECONNRESET' failed: ETIMEDOUT", arguments)


def test_arguments_with_half_a_surrogate_pair_are_sent(tmp_path: Path) -> None:
    async def body(box: McpToolBox) -> None:
        assert (await box.call("a", "echo", {"text": "half \ud83d"})).text == "half ?"

    with_box(tmp_path, {"a": rogue()}, body)


def test_a_long_reply_is_read_quickly(tmp_path: Path) -> None:
    async def body(box: McpToolBox) -> None:
        begin = time.perf_counter()
        reply = await box.call("a", "big", {"chars": 10_000_000})
        assert time.perf_counter() - begin < 5.0
        assert reply.text == "x" * 10_000_000

    with_box(tmp_path, {"a": rogue()}, body)


def test_a_reply_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_LINE_BYTES", 100_000)

    async def body(box: McpToolBox) -> None:
        with pytest.raises(ToolError, match="3 attempts; the server was lost: wrote a line"):
            await box.call("a", "big", {"chars": 5_000_000})

    with_box(tmp_path, {"a": rogue()}, body)


def test_a_call_past_its_deadline_names_the_setting(tmp_path: Path) -> None:
    async def body(box: McpToolBox) -> None:
        begin = time.perf_counter()
        with pytest.raises(
            ToolError, match=r"a/sleep: .*tools\.servers\.a\.call_timeout_s = 0\.5 s"
        ):
            await box.call("a", "sleep", {"seconds": 30})
        assert time.perf_counter() - begin < 3.0
        assert (await box.call("a", "echo", {"text": "still here"})).text == "still here"
        assert box.num_restarts == 0, "it answers pings: it is only slow"

    with_box(tmp_path, {"a": rogue(call_timeout_s=0.5)}, body)


def test_a_server_that_hangs_is_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_matpo.mcp_tools.connection.PING_TIMEOUT_S", 0.5)

    async def body(box: McpToolBox) -> None:
        (before,) = box.pids()
        with pytest.raises(ToolError, match="no answer within"):
            await box.call("a", "sleep", {"seconds": 60})
        for _ in range(100):
            await asyncio.sleep(0.05)
            if box.pids() not in ([], [before]):
                break
        assert (await box.call("a", "echo", {"text": "new"})).text == "new"
        assert not psutil.pid_exists(before)
        assert box.num_restarts == 1

    with_box(tmp_path, {"a": rogue("single", call_timeout_s=1.5)}, body)


def test_a_crash_during_a_call_restarts_and_retries(tmp_path: Path) -> None:
    async def body(box: McpToolBox) -> None:
        marker = {"marker": str(tmp_path / "marker")}
        replies = await asyncio.gather(
            box.call("a", "sleep", {"seconds": 0.2}),
            box.call("a", "die_once", marker),
            box.call("a", "echo", {"text": "x"}),
        )
        assert [reply.text for reply in replies] == ["slept 0.2", "survived", "x"]
        assert box.num_restarts == 1

    with_box(tmp_path, {"a": rogue()}, body)
    assert "dying as told" in (tmp_path / "tool-a-0.log").read_text()


def test_a_call_that_always_kills_the_server_gives_up(tmp_path: Path) -> None:
    async def body(box: McpToolBox) -> None:
        with pytest.raises(
            ToolError, match="a/die: 3 attempts; the server was lost: exited with code 7"
        ) as caught:
            await box.call("a", "die", {})
        assert "exited with code 7" in str(caught.value)
        assert (await box.call("a", "echo", {"text": "back"})).text == "back"

    with_box(tmp_path, {"a": rogue()}, body)


def test_a_server_that_cannot_come_back_fails_calls_quickly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_matpo.mcp_tools.connection.MAX_QUICK_RESTARTS", 2)

    async def body(box: McpToolBox) -> None:
        begin = time.perf_counter()
        with pytest.raises(ToolError, match="tool server 'a' keeps dying") as caught:
            await box.call("a", "die", {})
        assert "exited with code 4" in str(caught.value)
        with pytest.raises(ToolError, match="keeps dying"):
            await box.call("a", "echo", {})
        assert time.perf_counter() - begin < 10.0

    with_box(tmp_path, {"a": rogue("flaky", str(tmp_path / "count"))}, body)
