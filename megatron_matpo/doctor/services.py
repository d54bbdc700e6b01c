"""Tool servers, keys and the judge: what a run needs beside its own machines.

A key's value is never shown: lines name variables, and the command redacts all that it prints.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from dataclasses import replace

from megatron_matpo.config import Config
from megatron_matpo.config.reward import JUDGE
from megatron_matpo.config.tools import McpServerConfig
from megatron_matpo.doctor.child import ask
from megatron_matpo.doctor.lines import Line, Site
from megatron_matpo.errors import ToolError
from megatron_matpo.mcp_tools.pool import McpToolBox
from megatron_matpo.rewards.probe import probe_judge

_MIN_NODE = 18
"""Major version. The search server uses `fetch`, which Node has since 18."""
_CLOSE_TIMEOUT_S = 15.0
_SEARCH_TIMEOUT_S = 30.0
"""A search that takes longer would slow every episode; so the doctor does not wait for it."""
_SEARCH = "google_search"
_KNOWN_KEYS = ("OPENAI_API_KEY", "SERPER_API_KEY", "WANDB_API_KEY", "HF_TOKEN")


def key_names(config: Config) -> dict[str, str]:
    """Variable that the run needs -> the setting that names it."""
    names: dict[str, str] = {}
    for server, settings in config.tools.servers.items():
        for variable in settings.env_from:
            names.setdefault(variable, f"tools.servers.{server}.env_from")
        for variable in settings.headers_from.values():
            names.setdefault(variable, f"tools.servers.{server}.headers_from")
    if config.reward.grader == JUDGE and config.reward.judge.api_key_env:
        names.setdefault(config.reward.judge.api_key_env, "reward.judge.api_key_env")
    if config.obs.wandb_mode == "online":
        names.setdefault("WANDB_API_KEY", "obs.wandb_mode=online")
    return names


def secrets(config: Config) -> list[str]:
    """Values that must not be printed, the longest first: one may be the beginning of another."""
    names = {*key_names(config), *_KNOWN_KEYS}
    values = {part for name in names for part in os.environ.get(name, "").split()}
    return sorted((value for value in values if len(value) >= 4), key=len, reverse=True)


def check_keys(site: Site) -> list[Line]:
    """`keys`: every variable that the recipe names is set."""
    names = key_names(site.config)
    missing = {name: where for name, where in names.items() if not os.environ.get(name, "").strip()}
    if missing:
        return [
            Line("keys", "fail", f"{name} is not set ({where})", f"export {name}=...")
            for name, where in missing.items()
        ]
    seen = f"set: {', '.join(names)}" if names else "the recipe names none"
    return [Line("keys", "pass", seen)]


def check_node(site: Site) -> list[Line]:
    """`tools.node`: Node, where a server of the recipe (or the image) needs it."""
    name, fix = "tools.node", f"install Node {_MIN_NODE} or newer"
    servers = [key for key, item in site.config.tools.servers.items() if item.command == "node"]
    if not servers and site.mode != "build":
        return [Line(name, "pass", "no server of the recipe needs Node")]
    if shutil.which("node") is None:
        return [Line(name, "fail", "no node on PATH", fix)]
    answer = ask(["node", "--version"], site.config.doctor.check_timeout_s)
    version = answer.output.strip()
    major = version.removeprefix("v").partition(".")[0]
    if answer.problem or not major.isdigit():
        return [Line(name, "fail", f"node --version: {answer.problem or version}", fix)]
    if int(major) < _MIN_NODE:
        return [Line(name, "fail", f"Node {version}", fix)]
    return [Line(name, "pass", f"Node {version}")]


def check_servers(site: Site) -> list[Line]:
    """`tools.servers`: each is started (one process of it), and says what tools it has."""
    servers = site.config.tools.servers
    if not servers:
        return [Line("tools.servers", "pass", "the recipe has none")]

    async def all_of_them() -> list[list[Line]]:
        return await asyncio.gather(
            *(_check_server(site, name, server) for name, server in servers.items())
        )

    return [line for lines in asyncio.run(all_of_them()) for line in lines]


async def _check_server(site: Site, name: str, server: McpServerConfig) -> list[Line]:
    line_name = f"tools.servers.{name}"
    # One process, one attempt: more would only say the same later.
    call_s = min(server.call_timeout_s, _SEARCH_TIMEOUT_S)
    single = replace(server, num_processes=1, max_attempts=1, call_timeout_s=call_s)
    one = replace(site.config.tools, servers={name: single})
    limit_s = server.start_timeout_s + call_s + _CLOSE_TIMEOUT_S
    fix = "docs/tools.md; the command by hand: " + " ".join([server.command, *server.args])
    with tempfile.TemporaryDirectory() as folder:
        try:
            async with asyncio.timeout(limit_s), McpToolBox(one, folder) as box:
                specs = box.specs()
                lines = [await _search(site, box, name)] if _costs(site, server, box) else []
        except ToolError as error:
            return [Line(line_name, "fail", " ".join(str(error).split()), fix)]
        except TimeoutError:
            seen = f"no answer in {limit_s:.0f} s"
            where = f"tools.servers.{name}.start_timeout_s"
            return [Line(line_name, "fail", seen, f"{fix}; its deadline is {where}")]
    if not specs:
        return [Line(line_name, "fail", "started, but has no tools", fix)]
    return [Line(line_name, "pass", f"tools: {', '.join(spec.name for spec in specs)}"), *lines]


def _costs(site: Site, server: McpServerConfig, box: McpToolBox) -> bool:
    """Whether to ask the service behind the server something, which may cost a search."""
    has_search = any(spec.name == _SEARCH for spec in box.specs())
    is_asked = site.mode == "full" and site.config.doctor.search_query != ""
    return is_asked and has_search and bool(server.env_from or server.headers_from)


async def _search(site: Site, box: McpToolBox, server: str) -> Line:
    """One search, which the service counts: nothing cheaper proves the key."""
    name, query = f"tools.search.{server}", site.config.doctor.search_query
    asked = f"asked {_SEARCH}(q={query!r}): "
    arguments = {"q": query, "gl": "us", "hl": "en"}
    fix = "check the key and the credit of the service, and HTTPS_PROXY of the servers' env"
    try:
        reply = await box.call(server, _SEARCH, arguments)
    except ToolError as error:
        return Line(name, "fail", asked + " ".join(str(error).split()), fix)
    if reply.is_error:
        return Line(name, "fail", asked + " ".join(reply.text.split())[:200], fix)
    return Line(name, "pass", f"{asked}{len(reply.text)} characters")


def check_judge(site: Site) -> list[Line]:
    """`judge`: its endpoint takes the key and knows the model. Lists models, which is free."""
    if site.config.reward.grader != JUDGE:
        return [Line("judge", "pass", f"reward.grader={site.config.reward.grader} asks none")]
    judge = site.config.reward.judge
    found = asyncio.run(probe_judge(judge, site.config.doctor.check_timeout_s))
    asked = f"asked GET {found.url}{' through the proxy' if found.is_proxied else ''}: "
    fix = "check reward.judge.base_url, the network and HTTPS_PROXY"
    if found.problem:
        return [Line("judge", "fail", asked + found.problem, fix)]
    if found.status in (401, 403):
        fix = f"check the value of {judge.api_key_env or 'reward.judge.api_key_env'}"
        return [Line("judge", "fail", f"{asked}the key is refused (HTTP {found.status})", fix)]
    if found.status >= 500 or 300 <= found.status < 400:
        return [Line("judge", "fail", f"{asked}HTTP {found.status}", fix)]
    if found.status != 200 or not found.models:
        seen = f"{asked}HTTP {found.status}, no list of models; the key is not proved"
        return [Line("judge", "warn", seen, "nothing, if the endpoint has no such list")]
    if judge.model not in found.models:
        seen = f"{asked}{len(found.models)} models, {judge.model} is not among them"
        return [Line("judge", "warn", seen, "name a model of the list: reward.judge.model")]
    return [Line("judge", "pass", f"{asked}has {judge.model}")]
