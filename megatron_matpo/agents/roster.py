"""The agents of a run: what each may call, enforced in its prompt and at execution alike.

Source: MATPO original, `sglang_rollout.py` and `examples/data_preprocess/prompt_utils.py`. Differs:
there, allow-lists only filter the planner's prompt; a planner may execute any tool, every worker is
shown all tools, and an agent of a name that the code does not know has no prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_matpo.agents import prompts
from megatron_matpo.agents.formats import GRAMMARS
from megatron_matpo.agents.grammar import CallGrammar
from megatron_matpo.agents.tools import ToolSpec
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.rollout import RolloutConfig
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
    grammar: CallGrammar
    takes_prompt_of_row: bool
    """The system prompt is the dataset row's (planners under `rollout.prompts: dataset`)."""

    @property
    def final_summary(self) -> str:
        """`always | on_overflow | never`, with `auto` resolved by role."""
        wanted = self.config.final_summary
        if wanted != "auto":
            return wanted
        return "on_overflow" if self.role is Role.PLANNER else "always"

    @property
    def objective(self) -> str:
        """What the agent is for, as its own system prompt says it."""
        if self.config.objective:
            return self.config.objective
        if self.role is Role.PLANNER:
            return prompts.PLANNER_OBJECTIVE
        return prompts.worker_objective(self.config.description, [tool.name for tool in self.tools])

    def system_prompt(self, from_dataset: str) -> str:
        """The system message: the row's, the recipe's template, or the built-in one."""
        if self.takes_prompt_of_row and from_dataset:
            return from_dataset
        if not self.config.system_prompt:
            return self.grammar.system_prompt(prompts.guidance(self.objective), self.tools)
        listed = self.grammar.tool_list(self.tools)
        return prompts.fill(self.config.system_prompt, tools=listed, objective=self.objective)

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

    @property
    def grammar(self) -> CallGrammar:
        """How all of them write calls."""
        return self.planner.grammar


def make_roster(
    agents: Mapping[str, AgentConfig], rollout: RolloutConfig, specs: Sequence[ToolSpec]
) -> Roster:
    """Resolve the allow-lists of the planner and of its workers.

    Args:
        agents: section `agents` of the recipe.
        rollout: who plans, where its prompt comes from, and how calls are written.
        specs: all tools of all servers.

    Raises:
        ConfigError: an allow-list names neither a server nor a worker agent, or holds two tools
            that the call format cannot tell apart.
    """
    if rollout.planner not in agents:
        known = ", ".join(agents) or "none"
        raise ConfigError(
            f"rollout.planner={rollout.planner}: no such agent; agents of the recipe: {known}"
        )
    maker = _Maker(agents, rollout, specs)
    first = maker.agent(rollout.planner, Role.PLANNER)
    reachable = {name: maker.agent(name, Role.WORKER) for name in sorted(first.delegates)}
    return Roster(first, reachable)


class _Maker:
    def __init__(
        self, agents: Mapping[str, AgentConfig], rollout: RolloutConfig, specs: Sequence[ToolSpec]
    ) -> None:
        self._agents = agents
        self._rollout = rollout
        self._specs = specs
        self._workers = {name for name, config in agents.items() if config.role == Role.WORKER}

    def agent(self, name: str, role: Role) -> Agent:
        callable_agents = self._workers if role is Role.PLANNER else set[str]()
        tools: list[ToolSpec] = []
        delegates: set[str] = set()
        for entry in self._agents[name].tools:
            if entry in callable_agents:
                tools.append(self._as_tool(entry))
                delegates.add(entry)
            else:
                tools.extend(self._of_server(name, entry))
        grammar = GRAMMARS[self._rollout.call_format]
        if not grammar.names_servers:
            self._refuse_equal_names(name, tools)
        return Agent(
            name=name,
            role=role,
            config=self._agents[name],
            tools=tuple(tools),
            delegates=frozenset(delegates),
            grammar=grammar,
            takes_prompt_of_row=role is Role.PLANNER and self._rollout.prompts == "dataset",
        )

    def _of_server(self, agent: str, server: str) -> list[ToolSpec]:
        found = [spec for spec in self._specs if spec.server == server]
        if not found:
            known = sorted({spec.server for spec in self._specs} | self._workers)
            raise ConfigError(
                f"agents.{agent}.tools={server}: neither a tool server nor a worker agent; "
                f"known: {', '.join(known) or 'none'}"
            )
        return found

    def _as_tool(self, name: str) -> ToolSpec:
        """A worker agent as its planner sees it; the server name is the agent's name."""
        config = self._agents[name]
        description = config.description or prompts.default_description(
            [spec.name for spec in self._specs if spec.server in config.tools]
        )
        return ToolSpec(name, config.tool_name, description, SUBTASK_SCHEMA)

    def _refuse_equal_names(self, agent: str, tools: Sequence[ToolSpec]) -> None:
        server_of: dict[str, str] = {}
        for tool in tools:
            other = server_of.setdefault(tool.name, tool.server)
            if other != tool.server:
                raise ConfigError(
                    f"agents.{agent}.tools: {other} and {tool.server} both have a tool named "
                    f"{tool.name}, and calls in the format rollout.call_format="
                    f"{self._rollout.call_format} name no server; set rollout.call_format=mcp_xml, "
                    "rename a worker's tool_name, or give the two servers to different agents"
                )
