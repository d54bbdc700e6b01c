"""A recipe's planner prompt, rendered from its agents and the tool schemas of its live servers."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence

from megatron_matpo.agents.prompt_check import listed_tools
from megatron_matpo.agents.roster import Agent, make_roster
from megatron_matpo.agents.tools import ToolSpec
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.load import load_recipe
from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.config.root import Config
from megatron_matpo.errors import ConfigError
from megatron_matpo.mcp_tools.corpus_server import TOOLS

PLANNER, WORKER, SERVER = "main_agent", "browsing_agent", "search_and_scrape_webpage"
"""Names of MATPO's own recipe, which its data sets and checkpoints know."""


def load(recipe: str, overrides: list[str]) -> Config:
    """The recipe, which has to have the planner that it names.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    config = load_recipe(recipe, overrides)
    name = config.rollout.planner
    if name not in config.agents:
        known = ", ".join(config.agents) or "none"
        raise ConfigError(f"rollout.planner={name}: no such agent; agents of the recipe: {known}")
    return config


def default_config(mode: str) -> Config:
    """MATPO's agents for `matpo` or `single_agent`."""
    tools = [WORKER] if mode == "matpo" else [SERVER]
    agents = {
        PLANNER: AgentConfig(role="planner", tools=tools),
        WORKER: AgentConfig(role="worker", tools=[SERVER]),
    }
    return Config(agents=agents, rollout=RolloutConfig(planner=PLANNER))


def serper_specs() -> list[ToolSpec]:
    """The tools of the Serper server that MATPO was trained with, without starting it."""
    return [
        ToolSpec(SERVER, tool["name"], tool["description"], tool["inputSchema"]) for tool in TOOLS
    ]


def live_specs(config: Config) -> list[ToolSpec]:
    """Start the recipe's tool servers, ask them for their tools, and stop them.

    Raises:
        ToolError: a server does not start within its `start_timeout_s`.
    """
    from megatron_matpo.mcp_tools.pool import McpToolBox

    async def ask(folder: str) -> list[ToolSpec]:
        async with McpToolBox(config.tools, folder) as box:
            return box.specs()

    with tempfile.TemporaryDirectory(prefix="matpo-data-") as folder:
        return asyncio.run(ask(folder))


def planner_of(config: Config, specs: Sequence[ToolSpec]) -> Agent:
    """The planner with its tools; `system_prompt("")` renders its prompt.

    Raises:
        ConfigError: an allow-list names something that is not there.
    """
    return make_roster(config.agents, config.rollout, specs).planner


def describe_tools(prompt: str) -> str:
    """Servers and tools that a system prompt lists, as `SERVER (TOOL, TOOL); SERVER (TOOL)`."""
    servers: dict[str, list[str]] = {}
    for tool in listed_tools(prompt):
        servers.setdefault(tool.server, []).append(tool.name)
    listed = "; ".join(
        f"{name} ({', '.join(tools)})" if name else ", ".join(tools)
        for name, tools in servers.items()
    )
    return listed or "no list of tools"
