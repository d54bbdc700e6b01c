"""Proves what the doctor says of keys, MCP servers and the judge: real servers, real HTTP.

The judge and the proxy are small HTTP servers made here; no paid service is asked.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_matpo.config.doctor import DoctorConfig
from megatron_matpo.config.reward import JudgeConfig, RewardConfig
from megatron_matpo.config.tools import McpServerConfig, ToolsConfig
from megatron_matpo.doctor import services
from megatron_matpo.doctor.services import (
    check_judge,
    check_keys,
    check_node,
    check_servers,
    key_names,
    secrets,
)
from tests.helpers.doctor_site import fake_program, only, site_of

KEY = "sk-planted-0123456789"
CORPUS = [
    *("-m", "megatron_matpo.mcp_tools.corpus_server"),
    *("--documents", "examples/smallworld/data/documents.jsonl"),
]


def judge_of(base_url: str, **changes) -> RewardConfig:
    judge = JudgeConfig(base_url=base_url, model="grader-1", api_key_env="JUDGE_KEY", **changes)
    return RewardConfig(grader="judge", judge=judge)


def tools_of(**servers: McpServerConfig) -> ToolsConfig:
    return ToolsConfig(servers=servers)


@contextmanager
def http_server(status: int, body: object, seen: list[tuple[str, str]]) -> Iterator[str]:
    """Answers every GET with `body`; notes (path, Authorization)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization", "")))
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JUDGE_KEY", KEY)


MODELS = {"data": [{"id": "other"}, {"id": "grader-1"}]}


def test_keys_are_named_by_whoever_needs_them_and_never_shown(tmp_path, monkeypatch):
    tools = tools_of(
        search=McpServerConfig(command="node", env_from=["SEARCH_KEY"]),
        far=McpServerConfig(url="http://far/mcp", headers_from={"Authorization": "FAR_TOKEN"}),
    )
    site = site_of(tmp_path, tools=tools, reward=judge_of("http://x"))
    assert key_names(site.config) == {
        "SEARCH_KEY": "tools.servers.search.env_from",
        "FAR_TOKEN": "tools.servers.far.headers_from",
        "JUDGE_KEY": "reward.judge.api_key_env",
    }
    monkeypatch.setenv("FAR_TOKEN", "Bearer far-secret")
    monkeypatch.delenv("SEARCH_KEY", raising=False)
    line = only(check_keys(site))
    assert (line.status, line.seen) == (
        "fail",
        "SEARCH_KEY is not set (tools.servers.search.env_from)",
    )
    monkeypatch.setenv("SEARCH_KEY", "search-secret")
    line = only(check_keys(site))
    assert (line.status, line.seen) == ("pass", "set: SEARCH_KEY, FAR_TOKEN, JUDGE_KEY")
    assert {"Bearer", "far-secret", "search-secret", KEY} <= set(secrets(site.config))


def test_the_judge_is_asked_for_its_models_with_the_key(tmp_path):
    seen: list[tuple[str, str]] = []
    with http_server(200, MODELS, seen) as url:
        line = only(check_judge(site_of(tmp_path, reward=judge_of(f"{url}/v1"))))
    assert (line.status, line.seen) == ("pass", f"asked GET {url}/v1/models: has grader-1")
    assert seen == [("/v1/models", f"Bearer {KEY}")]


def test_the_judge_is_asked_through_the_proxy_of_the_environment(tmp_path, monkeypatch):
    seen: list[tuple[str, str]] = []
    with http_server(200, MODELS, seen) as proxy:
        monkeypatch.setenv("http_proxy", proxy)
        line = only(check_judge(site_of(tmp_path, reward=judge_of("http://judge.invalid/v1"))))
    assert line.status == "pass"
    assert "through the proxy" in line.seen
    assert seen == [("http://judge.invalid/v1/models", f"Bearer {KEY}")]


@pytest.mark.parametrize(
    ("status", "body", "expected", "says"),
    [
        (401, {"error": {"message": f"wrong key {KEY}"}}, "fail", "the key is refused (HTTP 401)"),
        (503, {}, "fail", "HTTP 503"),
        (404, {}, "warn", "the key is not proved"),
        (200, {"data": [{"id": "other"}]}, "warn", "grader-1 is not among them"),
        (200, ["nonsense"], "warn", "no list of models"),
    ],
)
def test_what_the_judge_answers_decides(tmp_path, status, body, expected, says):
    with http_server(status, body, []) as url:
        line = only(check_judge(site_of(tmp_path, reward=judge_of(url))))
    assert line.status == expected
    assert says in line.seen
    assert KEY not in line.seen + line.fix


def test_a_judge_that_is_not_there_or_does_not_answer_is_a_failure(tmp_path):
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        line = only(check_judge(site_of(tmp_path, reward=judge_of(url, timeout_s=0.3))))
        assert line.status == "fail"
        assert "no answer in 0.3 s" in line.seen
    line = only(check_judge(site_of(tmp_path, reward=judge_of(url))))
    assert line.status == "fail"
    assert "Connect" in line.seen


def test_a_real_server_is_started_and_lists_its_tools(tmp_path):
    corpus = McpServerConfig(command="python", args=CORPUS, num_processes=8)
    line = only(check_servers(site_of(tmp_path, tools=tools_of(search=corpus))))
    assert (line.name, line.status) == ("tools.servers.search", "pass")
    assert line.seen == "tools: google_search, scrape"


def test_a_server_with_a_key_is_asked_one_search_in_full_only(tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCH_KEY", KEY)
    corpus = McpServerConfig(command="python", args=CORPUS, env_from=["SEARCH_KEY"])
    tools = tools_of(search=corpus)
    lines = check_servers(site_of(tmp_path, tools=tools))
    assert [line.name for line in lines] == ["tools.servers.search", "tools.search.search"]
    assert lines[1].status == "pass"
    assert lines[1].seen.startswith("asked google_search(q='matpo'): ")
    only(check_servers(site_of(tmp_path, tools=tools, mode="preflight")))
    doctor = DoctorConfig(search_query="")
    only(check_servers(site_of(tmp_path, tools=tools, doctor=doctor)))


@pytest.mark.parametrize(
    ("command", "args", "says"),
    [
        ("/nowhere/server", [], "/nowhere/server"),
        ("python", ["-c", "raise SystemExit('no licence')"], "no licence"),
        ("python", ["-c", "import time; time.sleep(60)"], "start_timeout_s"),
    ],
)
def test_a_server_that_does_not_start_is_a_failure_and_the_others_are_told(
    tmp_path, command, args, says
):
    bad = McpServerConfig(command=command, args=args, start_timeout_s=2.0)
    good = McpServerConfig(command="python", args=CORPUS)
    lines = check_servers(site_of(tmp_path, tools=tools_of(bad=bad, good=good)))
    assert [(line.name, line.status) for line in lines] == [
        ("tools.servers.bad", "fail"),
        ("tools.servers.good", "pass"),
    ]
    assert says in lines[0].seen


def test_a_server_that_quotes_its_key_does_not_spread_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCH_KEY", KEY)
    code = "import os, sys; sys.exit('cannot log in with ' + os.environ['SEARCH_KEY'])"
    bad = McpServerConfig(command="python", args=["-c", code], env_from=["SEARCH_KEY"])
    line = only(check_servers(site_of(tmp_path, tools=tools_of(bad=bad))))
    assert line.status == "fail"
    assert "cannot log in" in line.seen and KEY not in line.seen


def test_node_is_needed_by_node_servers_only(tmp_path, monkeypatch):
    tools = tools_of(search=McpServerConfig(command="node", args=["x.js"]))
    fake_program(tmp_path, monkeypatch, "node", "echo v16.20.0")
    assert only(check_node(site_of(tmp_path))).status == "pass"
    line = only(check_node(site_of(tmp_path, tools=tools)))
    assert (line.status, line.seen) == ("fail", "Node v16.20.0")
    fake_program(tmp_path, monkeypatch, "node", "echo v20.1.0")
    assert only(check_node(site_of(tmp_path, tools=tools))).status == "pass"
    monkeypatch.setattr(services.shutil, "which", lambda _: None)
    assert only(check_node(site_of(tmp_path, mode="build"))).seen == "no node on PATH"
