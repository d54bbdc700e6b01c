"""Proves the checks of the section `tools`, and that the web recipe passes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_matpo.config import Config, load_recipe
from megatron_matpo.config.tools import CacheConfig, McpServerConfig, ToolsConfig, UrlPolicyConfig
from megatron_matpo.config.validate_tools import check_tool_machine, check_tools

PATH = "tools.servers.web"
RECIPE = str(Path(__file__).parents[3] / "recipes" / "web_search.yaml")


def problems(server: McpServerConfig) -> list[str]:
    return list(check_tools(replace(Config(), tools=ToolsConfig({"web": server}))))


@pytest.mark.parametrize(
    "server",
    [
        McpServerConfig("python", ["-m", "x"], env={"PLAIN": "1"}, env_from=["API_KEY"]),
        McpServerConfig(url="http://localhost:8000/mcp"),
        McpServerConfig(url="https://[::1]:8000/mcp?profile=a", headers_from={"X-Key": "MY_KEY"}),
        McpServerConfig("python", breaker_failures=0, backoff_s=0),
    ],
)
def test_good_servers(server: McpServerConfig) -> None:
    assert problems(server) == []


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        (McpServerConfig(), f"{PATH}.command=: expected the program"),
        (McpServerConfig("python", url="http://x/"), f"{PATH}: has both command=python and url"),
        (McpServerConfig(url="ftp://x/mcp"), f"{PATH}.url=ftp://x/mcp: expected http://HOST"),
        (McpServerConfig(url="localhost:8000"), f"{PATH}.url=localhost:8000: expected http"),
        (McpServerConfig(url="http://[::1/"), f"{PATH}.url=http://[::1/: expected http"),
        (McpServerConfig(url="http://x:99999/"), f"{PATH}.url=http://x:99999/: expected http"),
        (McpServerConfig(url="http://x/a b"), f"{PATH}.url=http://x/a b: expected http"),
        (McpServerConfig(url="http://x/", args=["a"]), f"{PATH}.args: is for servers with"),
        (McpServerConfig(url="http://x/", env={"A": "1"}), f"{PATH}.env: is for servers with"),
        (McpServerConfig(url="http://x/", env_from=["A"]), f"{PATH}.env_from: is for servers"),
        (McpServerConfig("python", headers_from={"A": "B"}), f"{PATH}.headers_from.A: only"),
        (McpServerConfig(url="http://x/", headers_from={"A b": "B"}), f"{PATH}.headers_from.A b"),
        (McpServerConfig("python", num_processes=0), f"{PATH}.num_processes=0: must be at least 1"),
        (McpServerConfig("python", max_concurrency=0), f"{PATH}.max_concurrency=0: must be"),
        (McpServerConfig("python", max_attempts=0), f"{PATH}.max_attempts=0: must be at least 1"),
        (McpServerConfig("python", backoff_s=-1), f"{PATH}.backoff_s=-1: must be at least 0"),
        (McpServerConfig("python", breaker_failures=-1), f"{PATH}.breaker_failures=-1: must be"),
        (McpServerConfig("python", outage_pattern="("), f"{PATH}.outage_pattern='(': no regular"),
        (McpServerConfig("python", breaker_reset_s=0), f"{PATH}.breaker_reset_s=0: must be gr"),
        (McpServerConfig("python", start_timeout_s=0), f"{PATH}.start_timeout_s=0: must be gr"),
        (McpServerConfig("python", call_timeout_s=-2), f"{PATH}.call_timeout_s=-2: must be gr"),
    ],
)
def test_bad_servers(server: McpServerConfig, expected: str) -> None:
    (line,) = problems(server)
    assert line.startswith(expected)


@pytest.mark.parametrize(
    "server",
    [
        McpServerConfig(url="https://user:sesame@x/mcp"),
        McpServerConfig(url="https://x/mcp?api_key=sesame"),
        McpServerConfig(url="https://x/mcp?a=1&key=sesame"),
        McpServerConfig(url="https://x/mcp", headers_from={"Authorization": "Bearer sesame"}),
        McpServerConfig("python", env={"MY_TOKEN": "sesame"}),
    ],
)
def test_secrets_in_the_recipe_are_refused_without_being_shown(server: McpServerConfig) -> None:
    (line,) = problems(server)
    assert "sesame" not in line
    assert "headers_from" in line or "env_from" in line


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        (CacheConfig(mode="on"), "tools.cache.mode=on: expected one of off, read_write, replay"),
        (CacheConfig(mode="replay"), "tools.cache.path=: tools.cache.mode=replay needs the file"),
        (CacheConfig(max_age_days=-1), "tools.cache.max_age_days=-1: must be at least 0"),
    ],
)
def test_the_cache(cache: CacheConfig, expected: str) -> None:
    (line,) = check_tools(replace(Config(), tools=ToolsConfig(cache=cache)))
    assert line.startswith(expected)


@pytest.mark.parametrize("key", ["block", "allow"])
def test_url_patterns(key: str) -> None:
    good = ["example.org", "Example.org/Path*", "*.example.*", "bücher.example", "10.0.0.1/x"]
    bad = ["https://example.org", "example.org:80", "*", "*.*", "", "a b.org", "x.org/?q=1"]
    urls = UrlPolicyConfig(**{key: good + bad})
    lines = list(check_tools(replace(Config(), tools=ToolsConfig(urls=urls))))
    assert [line.partition(": expected")[0] for line in lines] == [
        f"tools.urls.{key}={pattern}" for pattern in bad
    ]


def test_what_the_machine_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    servers = {
        "far": McpServerConfig(url="http://x/", headers_from={"X-Key": "MY_KEY"}),
        "near": McpServerConfig("python", ["no/server.py"], env_from=["MY_KEY"]),
        "web": McpServerConfig("python", ["tools/serper/none/index.js"]),
    }
    cache = CacheConfig(mode="replay", path=str(tmp_path / "none.sqlite"))
    tools = ToolsConfig(servers, cache=cache)
    assert [
        line.partition(":")[0] for line in check_tool_machine(replace(Config(), tools=tools))
    ] == [
        "tools.servers.far.headers_from.X-Key=MY_KEY",
        "tools.servers.near.args=no/server.py",
        "tools.servers.near.env_from=MY_KEY",
        "tools.servers.web.args=tools/serper/none/index.js",
        f"tools.cache.path={cache.path}",
    ]
    monkeypatch.setenv("MY_KEY", "x")
    tools = ToolsConfig({"far": servers["far"]})
    assert list(check_tool_machine(replace(Config(), tools=tools))) == []


def test_the_web_recipe_is_complete_but_for_model_and_data() -> None:
    config = load_recipe(RECIPE, [])
    assert config.reward.grader == "judge"
    assert config.tools.result_max_chars == 20000 and config.rollout.context_length == 40960
    assert config.tools.urls.block_leaks and config.tools.cache.mode == "read_write"
    for agent in config.agents.values():
        assert (agent.max_turns, agent.summary_reserve_tokens) == (20, 4096)
    single = load_recipe(RECIPE, ["rollout.planner=single_agent"])
    assert single.agents[single.rollout.planner].tools == ["search_and_scrape_webpage"]
