"""Violations in the section `tools`: servers, cache, URL policy."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from megatron_matpo.config.root import Config
from megatron_matpo.config.tools import CacheConfig, McpServerConfig, UrlPolicyConfig

_SECRET_NAME = re.compile(r"(API_?KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL)", re.IGNORECASE)
_SECRET_PARAMETER = re.compile(
    r"[?&][^=&]*(key|token|secret|password|credential|auth)[^=&]*=", re.I
)
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Host with optional `*`s, then a path; at least one letter or digit, so that nothing matches all.
_URL_PATTERN = re.compile(r"(?=[^/]*[^\W_])[\w*.-]+(/[^\s?#\\]*)?")
_NODE = "; install Node 18 or newer (Debian, Ubuntu: apt-get install nodejs npm)"
# Programs that recipes are likely to name, and how a machine gets them.
_HOW_TO_INSTALL = {
    "node": _NODE,
    "npx": _NODE,
    "uvx": "; install uv (pip install uv)",
}
_SERPER_HINT = (
    "; `make setup` installs it where npm is (Debian, Ubuntu: apt-get install nodejs npm)"
)
_CACHE_MODES = ("off", "read_write", "replay")


def check_tools(config: Config) -> Iterator[str]:
    """Violations that the configuration alone shows."""
    for name, server in config.tools.servers.items():
        yield from check_server(name, server)
    yield from _check_cache(config.tools.cache)
    yield from _check_urls(config.tools.urls)


def check_tool_machine(config: Config) -> Iterator[str]:
    """Violations that this machine shows: programs, files, environment variables.

    All servers are started, also those that no agent uses.
    """
    for name, server in config.tools.servers.items():
        path = f"tools.servers.{name}"
        if server.command not in ("", "python") and shutil.which(server.command) is None:
            hint = _HOW_TO_INSTALL.get(server.command, "")
            yield f"{path}.command={server.command}: no such program on PATH{hint}"
        script = server.args[0] if server.args else ""
        if script.endswith((".py", ".js", ".mjs", ".cjs")) and not Path(script).is_file():
            hint = _SERPER_HINT if script.startswith("tools/serper/") else ""
            yield f"{path}.args={script}: no such file{hint}"
        for variable in server.env_from:
            if not os.environ.get(variable):
                yield f"{path}.env_from={variable}: the environment variable is not set"
        for header, variable in server.headers_from.items():
            if not os.environ.get(variable):
                yield (
                    f"{path}.headers_from.{header}={variable}: the environment variable is not set"
                )
    cache = config.tools.cache
    if cache.mode == "replay" and cache.path and not Path(cache.path).is_file():
        yield (
            f"tools.cache.path={cache.path}: no such file, and tools.cache.mode=replay needs the "
            "replies of an earlier run; record them with tools.cache.mode=read_write"
        )


def check_server(name: str, server: McpServerConfig) -> Iterator[str]:
    """Violations of one tool server by itself."""
    path = f"tools.servers.{name}"
    if server.url:
        yield from _check_remote(path, server)
    else:
        yield from _check_process(path, server)
    for field in ("num_processes", "max_concurrency", "max_attempts"):
        if getattr(server, field) < 1:
            yield f"{path}.{field}={getattr(server, field)}: must be at least 1"
    for field in ("start_timeout_s", "call_timeout_s", "breaker_reset_s"):
        if getattr(server, field) <= 0:
            yield f"{path}.{field}={getattr(server, field)}: must be greater than 0"
    try:
        re.compile(server.outage_pattern)
    except re.error as error:
        yield f"{path}.outage_pattern={server.outage_pattern!r}: no regular expression ({error})"
    for field in ("backoff_s", "breaker_failures"):
        if getattr(server, field) < 0:
            yield f"{path}.{field}={getattr(server, field)}: must be at least 0"


def _check_process(path: str, server: McpServerConfig) -> Iterator[str]:
    if not server.command:
        yield (
            f"{path}.command=: expected the program that serves MCP over stdio, such as python, "
            f"or in its place {path}.url, the address of a server that speaks streamable HTTP"
        )
    for header in server.headers_from:
        yield f"{path}.headers_from.{header}: only servers with {path}.url are sent headers"
    for variable in server.env:
        # The value is left out on purpose: it may be the secret itself.
        if _SECRET_NAME.search(variable):
            yield (
                f"{path}.env.{variable}: looks like a secret, and the configuration is written to "
                f"disk; export {variable} and name it in {path}.env_from"
            )


def _check_remote(path: str, server: McpServerConfig) -> Iterator[str]:
    if server.command:
        yield f"{path}: has both command={server.command} and url; keep one of them"
    for field in ("args", "env", "env_from"):
        if getattr(server, field):
            yield f"{path}.{field}: is for servers with {path}.command; this one has {path}.url"
    try:
        parts = urlsplit(server.url)
        is_web = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, is_web = urlsplit(""), False
    secret = parts.username is not None or _SECRET_PARAMETER.search(f"?{parts.query}") is not None
    if secret:
        # The value is left out on purpose.
        yield (
            f"{path}.url: holds what looks like a secret, and the configuration is written to "
            f"disk; send it as a header and name its variable in {path}.headers_from"
        )
    elif not is_web or re.search(r"\s", server.url):
        yield f"{path}.url={server.url}: expected http://HOST[:PORT]/PATH or https://..."
    for header, variable in server.headers_from.items():
        if not _HEADER_NAME.fullmatch(header):
            yield f"{path}.headers_from.{header}: is no name of an HTTP header"
        if not _VARIABLE_NAME.fullmatch(variable):
            # The value is left out on purpose: it may be the secret itself.
            yield (
                f"{path}.headers_from.{header}: expected the name of an environment variable that "
                "holds the header's value, such as SEARCH_AUTHORIZATION"
            )


def _check_cache(cache: CacheConfig) -> Iterator[str]:
    if cache.mode not in _CACHE_MODES:
        yield f"tools.cache.mode={cache.mode}: expected one of {', '.join(_CACHE_MODES)}"
    if cache.mode == "replay" and not cache.path:
        yield (
            "tools.cache.path=: tools.cache.mode=replay needs the file of an earlier run, such as "
            "runs/NAME/cache.sqlite"
        )
    if cache.max_age_days < 0:
        yield f"tools.cache.max_age_days={cache.max_age_days}: must be at least 0"


def _check_urls(urls: UrlPolicyConfig) -> Iterator[str]:
    for key, patterns in (("block", urls.block), ("allow", urls.allow)):
        for pattern in patterns:
            if not _URL_PATTERN.fullmatch(pattern):
                yield (
                    f"tools.urls.{key}={pattern}: expected HOST or HOST/PATH without scheme, port "
                    "and query, such as example.org, example.org/files* or *.example.*"
                )
