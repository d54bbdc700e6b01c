"""Sections `agents` and `tools`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AgentConfig:
    """One role that the policy plays."""

    role: str = "worker"
    """`planner | worker`."""
    tools: list[str] = field(default_factory=list[str])
    """Allow-list: names of MCP servers (`tools.servers`) and, for planners, of worker agents."""
    system_prompt: str = ""
    """Template of the system message; `{tools}` becomes the rendered tool list. Empty: planners
    take the dataset row's, workers a built-in one."""
    user_template: str = ""
    """Workers: template of the user message with `{task}` and `{subtask}`. Empty: built in."""
    tool_name: str = "search_and_browse"
    """Workers: name of the tool through which a planner calls this agent."""
    description: str = ""
    """Workers: what the planner reads about that tool."""
    max_turns: int = 20
    max_tokens_per_turn: int = 4096
    max_invalid_calls: int = 1
    """Malformed calls that get an error reply and another chance; the next one ends the episode."""
    max_calls_per_turn: int = 8
    """Calls of one message that are executed; further ones are malformed calls."""
    final_summary: str = "never"
    """`always | on_overflow | never`: one more turn in which no tool may be used; `on_overflow`
    means whenever context or turns ran out."""
    summary_reserve_tokens: int = 4096
    """Context kept free for the final summary."""


@dataclass(frozen=True)
class McpServerConfig:
    """One MCP server, started once per run and kept."""

    command: str = ""
    """Program for stdio; `python` means the trainer environment's own."""
    args: list[str] = field(default_factory=list[str])
    env: dict[str, str] = field(default_factory=dict[str, str])
    """Plain values only; secrets are named in `env_from`."""
    env_from: list[str] = field(default_factory=list[str])
    """Environment variables handed through, e.g. SERPER_API_KEY; never written anywhere."""
    num_processes: int = 1
    max_concurrency: int = 32
    """Calls in flight over all processes of this server."""
    start_timeout_s: float = 30.0
    call_timeout_s: float = 180.0


@dataclass(frozen=True)
class ToolsConfig:
    """Tool servers and what is done with their replies."""

    servers: dict[str, McpServerConfig] = field(default_factory=dict[str, McpServerConfig])
    result_max_chars: int = 20000
    """Longer replies are cut, with a visible mark."""
