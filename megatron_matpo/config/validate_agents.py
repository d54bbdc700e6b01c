"""Violations in the section `agents`: each agent by itself, and who may call whom."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.root import Config

_ROLES = ("planner", "worker")
_AT_LEAST = {
    "context_length": 0,
    "timeout_s": 0,
    "max_turns": 1,
    "max_tokens_per_turn": 1,
    "max_calls_per_turn": 1,
    "max_invalid_calls": 0,
    "summary_reserve_tokens": 0,
}
_SUMMARIES = ("auto", "always", "on_overflow", "never")


def check_agent(name: str, agent: AgentConfig) -> Iterator[str]:
    """Violations of one agent by itself."""
    path = f"agents.{name}"
    if agent.role not in _ROLES:
        yield f"{path}.role={agent.role}: expected one of {', '.join(_ROLES)}"
    if agent.final_summary not in _SUMMARIES:
        yield f"{path}.final_summary={agent.final_summary}: expected one of {', '.join(_SUMMARIES)}"
    for field, low in _AT_LEAST.items():
        if getattr(agent, field) < low:
            yield f"{path}.{field}={getattr(agent, field)}: must be at least {low}"
    if agent.role == "worker" and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", agent.tool_name):
        yield f"{path}.tool_name={agent.tool_name}: expected a tool name (letters, digits, '_')"


def check_agent_limits(config: Config) -> Iterator[str]:
    """Every agent's limits beside those of the rollout."""
    rollout = config.rollout
    for name, agent in config.agents.items():
        path = f"agents.{name}"
        key, context = "rollout.context_length", rollout.context_length
        if agent.context_length > context:
            yield f"{path}.context_length={agent.context_length}: must be at most {key}={context}"
        elif agent.context_length:
            key, context = f"{path}.context_length", agent.context_length
        if agent.max_tokens_per_turn >= context:
            yield (
                f"{path}.max_tokens_per_turn={agent.max_tokens_per_turn}: must be less than "
                f"{key}={context}"
            )
        if agent.final_summary != "never" and agent.summary_reserve_tokens >= context:
            yield (
                f"{path}.summary_reserve_tokens={agent.summary_reserve_tokens}: must be less than "
                f"{key}={context}"
            )
        if agent.timeout_s >= rollout.episode_timeout_s:
            yield (
                f"{path}.timeout_s={agent.timeout_s:g}: must be less than "
                f"rollout.episode_timeout_s={rollout.episode_timeout_s:g}, past which the episode "
                "is given up; 0 sets no limit"
            )


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
    elif chosen.system_prompt and config.rollout.prompts == "dataset":
        yield (
            f"agents.{config.rollout.planner}.system_prompt: rollout.prompts=dataset takes the "
            "planner's prompt from the rows; leave it empty, or set rollout.prompts=rendered"
        )
    for name in workers:
        if name in config.tools.servers:
            yield f"agents.{name}: a tool server has the same name; rename one of them"
    for name, agent in config.agents.items():
        yield from _check_texts(f"agents.{name}", agent)
        allowed = [*config.tools.servers, *(workers if agent.role == "planner" else [])]
        for tool in agent.tools:
            if tool in allowed:
                continue
            why = "no such tool server or worker agent"
            if tool in config.agents:
                why = "only a planner may call agents, and only workers can be called"
            yield f"agents.{name}.tools={tool}: {why}; known: {', '.join(allowed) or 'none'}"
        twice = sorted({tool for tool in agent.tools if agent.tools.count(tool) > 1})
        if twice:
            yield f"agents.{name}.tools: {', '.join(twice)} more than once; name each one once"
        called = [config.agents[tool].tool_name for tool in {*agent.tools} if tool in workers]
        if len(set(called)) < len(called):
            yield f"agents.{name}.tools: its workers share a tool_name; give each its own"


def _check_texts(path: str, agent: AgentConfig) -> Iterator[str]:
    if agent.role == "worker" and agent.user_template and "{subtask}" not in agent.user_template:
        yield f"{path}.user_template: has no {{subtask}}, so the worker would not know what to do"
    if agent.objective and agent.system_prompt and "{objective}" not in agent.system_prompt:
        yield (
            f"{path}.objective: nobody would read it, for {path}.system_prompt has no "
            "{objective}; put it there, or leave one of the two empty"
        )
