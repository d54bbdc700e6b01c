"""The planner/worker loop: one episode from a question to a tree of trajectories.

One loop serves both roles: sample a turn, read its calls, run them at the same time, append the
replies in the order of the calls. A call to a worker agent runs the same loop in a fresh context.

Invariants:

* a trajectory ends with exactly one status; infrastructure failures end the whole episode and are
  never shown to the model;
* replies are appended whole or not at all: what does not fit ends the trajectory as `overflow`, so
  that no token stands in a context that the engine could not have seen;
* workers are numbered in the order of the planner's calls, whatever order they finish in.

Source: arXiv:2510.04678 (planner and workers in one policy); MATPO original, `sglang_rollout.py`.
Differs: calls of one turn, workers included, run concurrently and their replies keep call order;
a call that cannot be executed gets a reply (bounded by `max_invalid_calls`) instead of ending the
episode as if it were the answer; on overflow nothing is dropped from the context; a turn cut by
length is not searched for calls; `final_summary: on_overflow` also covers a spent turn budget.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace

from megatron_matpo.agents import prompts
from megatron_matpo.agents.conversation import Conversation, Lineage
from megatron_matpo.agents.grammar import (
    CallOutcome,
    ParsedCall,
    parse_calls,
    refuse_surplus,
    strip_calls,
    visible_text,
)
from megatron_matpo.agents.roster import Roster
from megatron_matpo.agents.sampling import Sampler
from megatron_matpo.agents.tools import ToolBox
from megatron_matpo.data.chat import Chat
from megatron_matpo.errors import EngineError, ToolError
from megatron_matpo.types import CallRecord, Role, Status, Trajectory

# Tokens that an engine keeps free behind the last sampled one.
_SPARE_TOKENS = 1
_SPENT = (Status.OVERFLOW, Status.MAX_TURNS)


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """Limits that all agents of an episode share."""

    context_tokens: int
    """`rollout.context_length`: tokens of one trajectory, prompt included."""
    timeout_s: float
    """`rollout.episode_timeout_s`: wall clock of the episode, workers included."""
    report_max_chars: int
    """`tools.result_max_chars`: a worker's report to its planner."""


@dataclass(frozen=True, slots=True)
class EpisodeTree:
    """What an episode left behind, not yet graded."""

    planner: Trajectory
    workers: tuple[Trajectory, ...]
    said: str
    """What the planner's last turn says, thoughts left out; the answer is looked for here."""


class Driver:
    """Runs episodes; holds no state of its own between them."""

    def __init__(self, roster: Roster, chat: Chat, tools: ToolBox, limits: EpisodeLimits) -> None:
        """All arguments are shared by all episodes of a run."""
        self._roster = roster
        self._chat = chat
        self._tools = tools
        self._limits = limits

    async def run(self, sampler: Sampler, episode_id: str, system: str, task: str) -> EpisodeTree:
        """Run one episode to its end; failures of the infrastructure are statuses.

        Args:
            sampler: the policy, at the version that the step asks for.
            episode_id: unique; trajectories are `ID.p` and `ID.w0`, `ID.w1`, ...
            system: system message of the dataset row.
            task: user message of the dataset row.
        """
        episode = _Episode(self._roster, self._chat, self._tools, self._limits, sampler, episode_id)
        return await episode.run(system, task)


class _Episode:
    """One running episode."""

    def __init__(
        self,
        roster: Roster,
        chat: Chat,
        tools: ToolBox,
        limits: EpisodeLimits,
        sampler: Sampler,
        episode_id: str,
    ) -> None:
        self._roster = roster
        self._chat = chat
        self._tools = tools
        self._limits = limits
        self._sampler = sampler
        self._id = episode_id
        self._workers: list[Conversation] = []

    async def run(self, system: str, task: str) -> EpisodeTree:
        lineage = Lineage(f"{self._id}.p", self._roster.planner, task)
        planner = Conversation(lineage, self._chat, system)
        status, error = await self._run_to_status(planner)
        said = visible_text(planner.last_said(), self._chat.opens_thinking)
        return EpisodeTree(
            planner.freeze(status, error),
            tuple(worker.freeze(status, error) for worker in self._workers),
            said,
        )

    async def _run_to_status(self, planner: Conversation) -> tuple[Status, str]:
        """Run, and turn failures of the infrastructure into (status, reason)."""
        limit = self._limits.timeout_s
        deadline = asyncio.timeout(limit)
        try:
            async with deadline:
                await self._run_agent(planner)
        except ToolError as error:
            return Status.TOOL_FAILURE, str(error)
        except EngineError as error:
            return Status.ENGINE_FAILURE, str(error)
        except TimeoutError:
            if not deadline.expired():
                raise
            return Status.DEADLINE, f"no end after {limit:g} s (rollout.episode_timeout_s)"
        assert planner.status is not None, "an agent that is done has a status"
        return planner.status, ""

    async def _run_agent(self, conversation: Conversation) -> None:
        """Loop, then the final summary if the agent is to write one."""
        status = await self._loop(conversation)
        wanted = conversation.agent.final_summary
        if wanted == "always" or (wanted == "on_overflow" and status in _SPENT):
            await self._summarise(conversation, status)
        conversation.status = status

    async def _loop(self, conversation: Conversation) -> Status:
        agent, config = conversation.agent, conversation.agent.config
        num_invalid = 0
        while True:
            room = self._room(conversation)
            if room < 1:
                return Status.OVERFLOW  # the prompt alone fills the context
            max_tokens = min(config.max_tokens_per_turn, room)
            text, is_cut = await self._sample(conversation, max_tokens)
            if is_cut:
                return Status.OVERFLOW
            calls = refuse_surplus(
                parse_calls(text, agent.tools, self._chat.opens_thinking), config.max_calls_per_turn
            )
            records = _records(conversation, calls)
            conversation.calls.extend(records)
            if not calls:
                return Status.ANSWERED
            num_invalid += sum(call.outcome is not CallOutcome.OK for call in calls)
            if num_invalid > config.max_invalid_calls:
                return Status.INVALID_CALL
            if conversation.num_model_turns >= config.max_turns:
                return Status.MAX_TURNS
            replies = await self._execute(conversation, calls, len(conversation.calls) - len(calls))
            turn = conversation.environment(replies)
            if len(turn.token_ids) >= self._room(conversation):
                return Status.OVERFLOW
            conversation.append_environment(turn)

    def _room(self, conversation: Conversation) -> int:
        """Tokens that may still be added, the reserve for a summary kept free."""
        agent = conversation.agent
        has_summary = agent.final_summary != "never"
        reserve = agent.config.summary_reserve_tokens if has_summary else 0
        used = len(conversation.ids) + _SPARE_TOKENS + reserve
        return self._limits.context_tokens - used

    async def _sample(self, conversation: Conversation, max_tokens: int) -> tuple[str, bool]:
        """Sample one turn: its text, and whether it was cut by length."""
        lineage_id = conversation.lineage.id
        sampled = await self._sampler.sample(conversation.ids, max_tokens, lineage_id)
        text = conversation.append_sampled(sampled)
        return text, sampled.finish_reason == "length"

    async def _execute(
        self, conversation: Conversation, calls: Sequence[ParsedCall], first_record: int
    ) -> list[str]:
        """Run the calls of one turn at the same time; replies in call order."""
        # Workers are made here, in call order, before anything runs.
        workers = [
            self._new_worker(conversation, call)
            if self._is_delegation(conversation, call)
            else None
            for call in calls
        ]
        jobs = [
            self._run_call(conversation, call, worker, first_record + index)
            for index, (call, worker) in enumerate(zip(calls, workers, strict=True))
        ]
        return await _gather(jobs)

    def _is_delegation(self, conversation: Conversation, call: ParsedCall) -> bool:
        return call.outcome is CallOutcome.OK and call.server in conversation.agent.delegates

    def _new_worker(self, parent: Conversation, call: ParsedCall) -> Conversation:
        assert parent.agent.role is Role.PLANNER, "only planners have workers in their tool list"
        lineage = Lineage(
            id=f"{self._id}.w{len(self._workers)}",
            agent=self._roster.workers[call.server],
            task=parent.lineage.task,
            subtask=call.arguments["subtask"],
            parent_id=parent.lineage.id,
            spawn_turn=parent.num_model_turns,
        )
        worker = Conversation(lineage, self._chat, system="")
        self._workers.append(worker)
        return worker

    async def _run_call(
        self, conversation: Conversation, call: ParsedCall, worker: Conversation | None, index: int
    ) -> str:
        """The reply to one call; notes worker and duration in the call's record."""
        if call.outcome is not CallOutcome.OK:
            return prompts.correction(call)
        start = time.monotonic()
        if worker is None:
            answer = await self._tools.call(call.server, call.tool, call.arguments)
            reply = answer.text
        else:
            await self._run_agent(worker)
            reply = self._report(worker)
        conversation.calls[index] = replace(
            conversation.calls[index],
            worker_id=worker.lineage.id if worker else "",
            duration_s=time.monotonic() - start,
        )
        return reply

    def _report(self, worker: Conversation) -> str:
        """What the planner reads: the worker's last message, without thoughts and calls."""
        said = visible_text(worker.last_said(), self._chat.opens_thinking)
        report = strip_calls(said)
        if not report:
            return prompts.missing_report(str(worker.status))
        limit = self._limits.report_max_chars
        if len(report) <= limit:
            return report
        return f"{report[:limit]}\n[... cut: {limit} of {len(report)} characters shown]"

    async def _summarise(self, conversation: Conversation, status: Status) -> None:
        """One more turn without tools, if the context still has room for it."""
        if not conversation.is_sampled_last:
            return  # the prompt alone filled the context
        lineage, is_failed = conversation.lineage, status is not Status.ANSWERED
        if conversation.agent.role is Role.PLANNER:
            request = prompts.planner_summary(lineage.task, is_failed)
        else:
            request = prompts.worker_summary(lineage.task, lineage.subtask, is_failed)
        turn = conversation.environment([request])
        used = len(conversation.ids) + len(turn.token_ids) + _SPARE_TOKENS
        room = self._limits.context_tokens - used
        if room < 1:
            return
        conversation.append_environment(turn)
        limit = conversation.agent.config.max_tokens_per_turn
        await self._sample(conversation, min(limit, room))


def _records(conversation: Conversation, calls: Sequence[ParsedCall]) -> list[CallRecord]:
    turn_index = len(conversation.turns) - 1
    return [CallRecord(turn_index, call.server, call.tool, call.outcome) for call in calls]


async def _gather(jobs: Sequence[Coroutine[None, None, str]]) -> list[str]:
    """Results in order; on the first failure the others are cancelled and waited for."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
