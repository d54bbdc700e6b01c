"""Episodes of `async_rollout.py`: what the policy says and how long tools take, without a model.

Episodes are drawn as `matpo simulate` draws them where nothing is recorded. The engine is asked for
as many tokens as a turn has; the words that call tools or end the episode are put behind them.
Times are divided by `TIME_SCALE`, numbers of tokens by `TOKEN_SCALE` (each stands for that many).
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from megatron_matpo.agents.sampling import Sampler
from megatron_matpo.agents.tools import ToolReply, ToolSpec
from megatron_matpo.config.root import Config
from megatron_matpo.data.tokenizer import Tokenizer
from megatron_matpo.rollout.generation import Generation
from megatron_matpo.simulation.draws import ASSUMED_LENGTHS
from megatron_matpo.simulation.episodes import Agent, Turn, all_agents
from megatron_matpo.simulation.lengths import Drawer, Lengths
from megatron_matpo.simulation.rates import read_section
from megatron_matpo.types import VersionSpan

TIME_SCALE = 40.0
TOKEN_SCALE = 8
SAMPLES = 8
"""Episodes of a question."""
PLANNER, WORKER = "planner", "browser"
_QUESTION = re.compile(r"Question (\d+):")
_CALL = (
    "\n<use_mcp_tool>\n<server_name>{server}</server_name>\n<tool_name>{tool}</tool_name>\n"
    "<arguments>\n{arguments}\n</arguments>\n</use_mcp_tool>"
)


class Script:
    """What every episode does: a function of seed, question and sample alone."""

    def __init__(self, seed: int, config: Config) -> None:
        """`config` has the limits of the agents."""
        self._seed = seed
        lengths = read_section(Lengths, str(ASSUMED_LENGTHS), "--lengths")
        drawer = Drawer(lengths, config)
        self.episode = lru_cache(maxsize=None)(
            lambda question, sample: drawer.episode(
                random.Random(f"{self._seed}/{question}/{sample}")
            )
        )

    def agent(self, question: int, conversation: str) -> Agent:
        """The planner `UID.SAMPLE.p`, or the worker `UID.SAMPLE.wN`."""
        _, sample, name = conversation.rsplit(".", 2)
        planner = self.episode(question, int(sample))
        if name == "p":
            return planner
        return [worker for turn in planner.turns for worker in turn.workers][int(name[1:])]

    def num_tokens(self, questions: Sequence[int]) -> int:
        """That engines sample for these questions."""
        episodes = [self.episode(q, sample) for q in questions for sample in range(SAMPLES)]
        return sum(
            _scaled(turn.num_tokens) for agent in all_agents(episodes) for turn in agent.turns
        )


def _scaled(num_tokens: int) -> int:
    return max(1, round(num_tokens / TOKEN_SCALE))


def _said(turn: Turn) -> str:
    """The calls that a turn ends with, or the answer."""
    calls = [
        _CALL.format(server="web", tool="search", arguments=json.dumps({"q": "it", "wait_s": s}))
        for s in turn.tools_s
    ]
    calls += [
        _CALL.format(
            server=WORKER, tool="search_and_browse", arguments=json.dumps({"subtask": "Find it."})
        )
        for _ in turn.workers
    ]
    return "".join(calls) or "\nThe answer is \\boxed{Ada}."


class Played:
    """A policy that says what the script wants: lengths go to the engine, words are put behind."""

    def __init__(
        self, inner: Sampler, script: Script, tokenizer: Tokenizer, places: dict[str, int]
    ) -> None:
        """`places` remembers the question of every episode, and is shared."""
        self._inner, self._script, self._tokenizer = inner, script, tokenizer
        self._end = tokenizer.encode("<|im_end|>")
        self._questions = places
        self._turns: dict[str, int] = {}

    async def sample(self, ids: Sequence[int], max_tokens: int, conversation_id: str) -> Generation:
        """As `Sampler.sample`."""
        episode = conversation_id.rpartition(".")[0]
        if episode not in self._questions:
            found = _QUESTION.search(self._tokenizer.decode(ids))
            assert found is not None, "an episode begins with its planner"
            self._questions[episode] = int(found[1])
        number = self._turns.get(conversation_id, 0)
        self._turns[conversation_id] = number + 1
        turn = self._script.agent(self._questions[episode], conversation_id).turns[number]
        wanted = _scaled(turn.num_tokens)
        sampled = await self._inner.sample(ids, wanted, conversation_id)
        words = [*self._tokenizer.encode(_said(turn)), *self._end]
        return Generation(
            token_ids=type(sampled.token_ids)("i", [*sampled.token_ids, *words]),
            logprobs=type(sampled.logprobs)("f", [*sampled.logprobs, *[-1.0] * len(words)]),
            finish_reason="stop",
            versions=(*sampled.versions, VersionSpan(sampled.versions[-1].version, len(words))),
        )


class SleepingTools:
    """One tool that takes as long as it is told to."""

    def specs(self) -> list[ToolSpec]:
        """As `ToolBox.specs`."""
        kinds = {"q": {"type": "string"}, "wait_s": {"type": "number"}}
        schema = {"type": "object", "properties": kinds, "required": ["q", "wait_s"]}
        return [ToolSpec("web", "search", "Search the web.", schema)]

    async def call(self, server: str, tool: str, arguments: dict[str, Any]) -> ToolReply:
        """As `ToolBox.call`."""
        await asyncio.sleep(arguments["wait_s"] / TIME_SCALE)
        return ToolReply("Nothing new. " * 8, False)
