"""Section `agents`."""

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
    context_length: int = 0
    """Tokens of one trajectory of this agent, prompt included; 0: `rollout.context_length`."""
    timeout_s: float = 0.0
    """Wall clock of this agent alone; past it, the agent makes no further turn but its final
    summary. 0: only `rollout.episode_timeout_s` counts."""
    max_turns: int = 20
    max_tokens_per_turn: int = 4096
    max_invalid_calls: int = 1
    """Malformed calls that get an error reply and another chance; the next one ends the episode."""
    max_calls_per_turn: int = 8
    """Calls of one message that are executed; further ones are malformed calls."""
    final_summary: str = "auto"
    """`auto | always | on_overflow | never`: one more turn in which no tool may be used;
    `on_overflow` means whenever context, turns or time ran out; `auto` is `always` for workers and
    `on_overflow` for planners, as the released MATPO checkpoints were trained."""
    summary_reserve_tokens: int = 4096
    """Context kept free for the final summary."""
