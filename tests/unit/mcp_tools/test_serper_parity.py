"""Our bundled server offers the same tools as Serper's MCP server, which MATPO was trained with.

The recorded contract is always checked. The server itself is asked only where Node is and the npm
package can be had (`MATPO_SERPER_SERVER` names its `build/index.js`, or npx has it in its cache);
listing tools needs no network and no account.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from megatron_matpo.config.tools import McpServerConfig, ToolsConfig
from megatron_matpo.errors import ToolError
from megatron_matpo.mcp_tools.corpus_server import TOOLS
from megatron_matpo.mcp_tools.pool import McpToolBox

PACKAGE = "serper-search-scrape-mcp-server@0.1.2"
Contract = dict[str, tuple[dict[str, str], list[str]]]

SERPER: Contract = {
    "google_search": (
        {
            "q": "string",
            "gl": "string",
            "hl": "string",
            "location": "string",
            "num": "number",
            "tbs": "string",
            "page": "number",
            "autocorrect": "boolean",
        },
        ["q", "gl", "hl"],
    ),
    "scrape": ({"url": "string", "includeMarkdown": "boolean"}, ["url"]),
}
"""Per tool: type of each argument, and the required ones. Source: PACKAGE, `tools/list`."""


def contract(name: str, schema: dict[str, object]) -> Contract:
    properties = schema["properties"]
    assert isinstance(properties, dict)
    types = {argument: value["type"] for argument, value in properties.items()}
    return {name: (types, list(schema["required"]))}  # type: ignore[call-overload]


def test_the_bundled_tools_have_serpers_contract() -> None:
    ours: Contract = {}
    for tool in TOOLS:
        ours |= contract(tool["name"], tool["inputSchema"])
    assert ours == SERPER


def serper_command() -> tuple[str, list[str]]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed")
    named = os.environ.get("MATPO_SERPER_SERVER", "")
    if named:
        return node, [named]
    npx = shutil.which("npx")
    if npx is None:
        pytest.skip("npx is not installed")
    return npx, ["--no-install", PACKAGE]


def test_serpers_server_has_the_recorded_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "not-a-key")
    command, arguments = serper_command()
    config = McpServerConfig(command, arguments, env_from=["SERPER_API_KEY"], start_timeout_s=20)

    async def run() -> Contract:
        theirs: Contract = {}
        async with McpToolBox(ToolsConfig({"serper": config}), tmp_path) as box:
            for spec in box.specs():
                theirs |= contract(spec.name, dict(spec.input_schema))
        return theirs

    try:
        theirs = asyncio.run(run())
    except ToolError as error:
        if "MATPO_SERPER_SERVER" in os.environ:
            raise  # the user says that it is there
        pytest.skip(f"{PACKAGE} is not there: {str(error).splitlines()[-1]}")
    assert theirs == SERPER
