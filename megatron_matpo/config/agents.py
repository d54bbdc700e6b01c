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
    """Template of the system message; `{tools}` becomes the tool list in the form of
    `rollout.call_format`, `{objective}` the text below. Empty: a built-in one. Planners under
    `rollout.prompts: dataset` have the dataset row's instead."""
    objective: str = ""
    """What the agent is for, in its own system prompt. Empty: planners solve the task; workers
    with `google_search` or `scrape` browse; other workers carry out a subtask with their tools,
    and read their own `description`."""
    user_template: str = ""
    """Workers: template of the user message with `{task}` and `{subtask}`. Empty: built in."""
    tool_name: str = "search_and_browse"
    """Workers: name of the tool through which a planner calls this agent."""
    description: str = ""
    """Workers: what the planner reads about that tool. Empty: a text that names its tools."""
    context_length: int = 0
    """Tokens of one trajectory of this agent, prompt included; 0: `rollout.context_length`."""
    timeout_s: float = 0.0
    """Wall clock of this agent alone, looked at between its steps: past it, the agent makes no
    further turn but its final summary (status `time_limit`; trained). A worker's time is also over
    when its planner's is. 0: only `rollout.episode_timeout_s` counts, past which the whole episode
    is given up."""
    max_turns: int = 20
    max_tokens_per_turn: int = 4096
    max_invalid_calls: int = 1
    """Messages of one trajectory with malformed calls, in all and not in a row, whose malformed
    calls get replies saying what is wrong, and another chance; one more such message ends the
    trajectory. 0: the first one ends it, as in MATPO's original."""
    max_calls_per_turn: int = 8
    """Calls of one message that are executed; further ones are malformed calls."""
    final_summary: str = "auto"
    """`auto | always | on_overflow | never`: one more turn in which no tool may be used;
    `on_overflow` means whenever context, turns or time ran out; `auto` is `always` for workers and
    `on_overflow` for planners, as the released MATPO checkpoints were trained."""
    summary_reserve_tokens: int = 4096
    """Context kept free for the final summary: its request, with the task in it, and what the
    agent then writes, which may be longer than `max_tokens_per_turn`."""
