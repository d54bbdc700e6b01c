"""Violations in the section `agents`: each agent by itself, and who may call whom."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.root import Config

_ROLES = ("planner", "worker")
_SUMMARIES = ("auto", "always", "on_overflow", "never")


def check_agent(name: str, agent: AgentConfig) -> Iterator[str]:
    """Violations of one agent by itself."""
    path = f"agents.{name}"
    if agent.role not in _ROLES:
        yield f"{path}.role={agent.role}: expected one of {', '.join(_ROLES)}"
    if agent.final_summary not in _SUMMARIES:
        yield f"{path}.final_summary={agent.final_summary}: expected one of {', '.join(_SUMMARIES)}"
    least = {
        "max_turns": 1,
        "max_tokens_per_turn": 1,
        "max_calls_per_turn": 1,
        "max_invalid_calls": 0,
    }
    for field, low in {**least, "summary_reserve_tokens": 0}.items():
        if getattr(agent, field) < low:
            yield f"{path}.{field}={getattr(agent, field)}: must be at least {low}"
    if agent.role == "worker" and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", agent.tool_name):
        yield f"{path}.tool_name={agent.tool_name}: expected a tool name (letters, digits, '_')"


def check_planner(config: Config) -> Iterator[str]:
    """The planner, and that every agent's tools exist."""
    planners = [name for name, agent in config.agents.items() if agent.role == "planner"]
    workers = [name for name, agent in config.agents.items() if agent.role == "worker"]
    chosen = config.agents.get(config.rollout.planner)
    if chosen is None:
        known = ", ".join(planners) or "none is defined"
        yield f"rollout.planner={config.rollout.planner}: no such agent; planner agents: {known}"
    elif chosen.role != "planner":
        yield (
            f"rollout.planner={config.rollout.planner}: its role is {chosen.role}; set "
            f"agents.{config.rollout.planner}.role=planner or name one of: {', '.join(planners)}"
        )
    for name in workers:
        if name in config.tools.servers:
            yield f"agents.{name}: a tool server has the same name; rename one of them"
    for name, agent in config.agents.items():
        allowed = [*config.tools.servers, *(workers if agent.role == "planner" else [])]
        for tool in agent.tools:
            if tool in allowed:
                continue
            why = "no such tool server or worker agent"
            if tool in config.agents:
                why = "only a planner may call agents, and only workers can be called"
            yield f"agents.{name}.tools={tool}: {why}; known: {', '.join(allowed) or 'none'}"
        called = [config.agents[tool].tool_name for tool in agent.tools if tool in workers]
        if len(set(called)) < len(called):
            yield f"agents.{name}.tools: its workers share a tool_name; give each its own"
