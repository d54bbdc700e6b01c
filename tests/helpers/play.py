"""Plays whole episodes of the driver with a scripted engine and a fake tool box."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from megatron_matpo.agents.driver import Driver, EpisodeLimits, EpisodeTree
from megatron_matpo.agents.roster import make_roster
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.rollout import RolloutConfig
from tests.helpers.rollouts import (
    CHATML,
    LLAMA3,
    MISTRAL,
    THINKING,
    FakeEngine,
    FakeToolBox,
    Script,
    call,
    make_chat,
    make_tokenizer,
)

ENDS = {CHATML: "<|im_end|>", THINKING: "<|im_end|>", LLAMA3: "<|eot_id|>", MISTRAL: "</s>"}
AGENTS = {
    "planner": AgentConfig(role="planner", tools=["browser"], max_turns=4, final_summary="never"),
    "browser": AgentConfig(role="worker", tools=["web"], max_turns=3, final_summary="never"),
}
SINGLE = {"planner": AgentConfig(role="planner", tools=["web"], max_turns=4, final_summary="never")}
LIMITS = EpisodeLimits(context_tokens=6000, timeout_s=5.0, report_max_chars=200)
ROLLOUT = RolloutConfig(planner="planner", prompts="dataset")
TASK = 'Who is "Bob"? {subtask} Box it.'


def play(
    script: Script,
    agents: dict[str, AgentConfig] = AGENTS,
    tools: FakeToolBox | None = None,
    template: str = CHATML,
    limits: EpisodeLimits = LIMITS,
    delay_s: float = 0.0,
    rollout: RolloutConfig = ROLLOUT,
) -> tuple[EpisodeTree, FakeEngine, FakeToolBox]:
    """One episode to its end."""
    tools = tools or FakeToolBox()
    engine = FakeEngine(script, make_tokenizer(template), ENDS[template], delay_s=delay_s)
    roster = make_roster(agents, rollout, tools.specs())
    driver = Driver(roster, make_chat(template), tools, limits)
    return asyncio.run(driver.run(engine, "e0", "You plan.", TASK)), engine, tools


def by_role(planner: list[str], worker: list[str]) -> Script:
    """The planner's turns in order, and those of every worker."""

    def script(conversation: str, turn: int, text: str) -> str:
        return (planner if conversation.endswith(".p") else worker)[turn]

    return script


def write_call(call_format: str, server: str, tool: str, **arguments: Any) -> str:
    """A call as the model has to write it in either format."""
    if call_format == "mcp_xml":
        return call(server, tool, **arguments)
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"
