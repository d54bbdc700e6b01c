"""The agents of a run: what each may call, enforced in its prompt and at execution alike.

Source: MATPO original, `sglang_rollout.py`. Differs: there, allow-lists only filter the planner's
prompt; a planner may execute any tool and every worker is shown all tools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_matpo.agents import prompts
from megatron_matpo.agents.tools import ToolSpec
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.types import Role

SUBTASK_SCHEMA: Mapping[str, object] = {
    "type": "object",
    "properties": {
        "subtask": {"type": "string", "description": "What the worker is to do, in full."}
    },
    "required": ["subtask"],
}


@dataclass(frozen=True, slots=True)
class Agent:
    """One role that the policy plays, with what it may call."""

    name: str
    role: Role
    config: AgentConfig
    tools: tuple[ToolSpec, ...]
    """All it may call, worker agents included."""
    delegates: frozenset[str]
    """Server names in `tools` that are worker agents."""

    @property
    def final_summary(self) -> str:
        """`always | on_overflow | never`, with `auto` resolved by role."""
        wanted = self.config.final_summary
        if wanted != "auto":
            return wanted
        return "on_overflow" if self.role is Role.PLANNER else "always"

    def system_prompt(self, from_dataset: str) -> str:
        """The system message: the recipe's template, else the row's (planner) or the built-in."""
        template = self.config.system_prompt
        if not template and self.role is Role.PLANNER and from_dataset:
            return from_dataset
        if not template:
            is_planner = self.role is Role.PLANNER
            template = prompts.PLANNER_SYSTEM_PROMPT if is_planner else prompts.WORKER_SYSTEM_PROMPT
        return prompts.fill(template, tools=prompts.tool_list(self.tools))

    def user_message(self, task: str, subtask: str) -> str:
        """First user message: the task itself, or a worker's recap of task and subtask."""
        if self.role is Role.PLANNER:
            return task
        template = self.config.user_template or prompts.WORKER_USER_TEMPLATE
        return prompts.fill(template, task=task, subtask=subtask)


@dataclass(frozen=True, slots=True)
class Roster:
    """The planner and the workers that it can reach."""

    planner: Agent
    workers: Mapping[str, Agent]


def make_roster(
    agents: Mapping[str, AgentConfig], planner: str, specs: Sequence[ToolSpec]
) -> Roster:
    """Resolve the allow-lists of the planner and of its workers.

    Args:
        agents: section `agents` of the recipe.
        planner: `rollout.planner`.
        specs: all tools of all servers.

    Raises:
        ConfigError: an allow-list names neither a server nor a worker agent.
    """
    if planner not in agents:
        known = ", ".join(agents) or "none"
        raise ConfigError(
            f"rollout.planner={planner}: no such agent; agents of the recipe: {known}"
        )
    workers = {name: config for name, config in agents.items() if config.role == Role.WORKER}
    first = _agent(planner, Role.PLANNER, agents[planner], specs, workers)
    reachable = {
        name: _agent(name, Role.WORKER, workers[name], specs, {})
        for name in sorted(first.delegates)
    }
    return Roster(first, reachable)


def _agent(
    name: str,
    role: Role,
    config: AgentConfig,
    specs: Sequence[ToolSpec],
    workers: Mapping[str, AgentConfig],
) -> Agent:
    tools: list[ToolSpec] = []
    delegates: set[str] = set()
    for entry in config.tools:
        found = [spec for spec in specs if spec.server == entry]
        if entry in workers:
            tools.append(_as_tool(entry, workers[entry]))
            delegates.add(entry)
        elif found:
            tools.extend(found)
        else:
            servers = sorted({spec.server for spec in specs} | set(workers))
            raise ConfigError(
                f"agents.{name}.tools={entry}: neither a tool server nor a worker agent; "
                f"known: {', '.join(servers) or 'none'}"
            )
    return Agent(name, role, config, tuple(tools), frozenset(delegates))


def _as_tool(name: str, config: AgentConfig) -> ToolSpec:
    """A worker agent as its planner sees it; the server name is the agent's name."""
    description = config.description or prompts.DEFAULT_AGENT_DESCRIPTION
    return ToolSpec(name, config.tool_name, description, SUBTASK_SCHEMA)
