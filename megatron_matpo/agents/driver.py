"""The planner/worker loop: one episode from a question to a tree of trajectories.

One loop serves both roles: sample a turn, read its calls, run them at the same time, append the
replies in the order of the calls. A call to a worker agent runs the same loop in a fresh context.

Invariants:

* a trajectory ends with exactly one status; infrastructure failures end the whole episode and are
  never shown to the model;
* a context only grows, and only by what the engine then sees;
* workers are numbered in the order of the planner's calls, whatever order they finish in;
* an agent's own limits (turns, tokens, context, time, invalid calls) end its trajectory, never the
  episode's; its time counts from its start to its summary, and a worker's ends with its planner's.

When replies no longer fit, or the agent's time is over, the replies of the last turn are cut to the
room there is and go into the context together with the request for the final summary: the newest
evidence is what a summary must not miss. Without a final summary nothing would read them, and they
are left out.

Source: arXiv:2510.04678 (planner and workers in one policy); MATPO original, `sglang_rollout.py`.
Differs: calls of one turn, workers included, run concurrently and their replies keep call order;
a call that cannot be executed gets a reply (bounded by `max_invalid_calls`) instead of ending the
episode as if it were the answer; on overflow nothing is dropped from the context; a turn cut by
length is not searched for calls; `final_summary: on_overflow` also covers spent turns and time.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace

from megatron_matpo.agents import prompts
from megatron_matpo.agents.conversation import Conversation, Lineage
from megatron_matpo.agents.evidence import fit_replies
from megatron_matpo.agents.grammar import CallOutcome, ParsedCall, refuse_surplus, visible_text
from megatron_matpo.agents.roster import Agent, Roster
from megatron_matpo.agents.sampling import Sampler
from megatron_matpo.agents.tools import ToolBox, cut_mark
from megatron_matpo.data.chat import Chat
from megatron_matpo.errors import EngineError, ToolError
from megatron_matpo.obs.spans import Track, note, span
from megatron_matpo.types import CallRecord, Role, Status, Trajectory

# Tokens that an engine keeps free behind the last sampled one.
_SPARE_TOKENS = 1
_SPENT = (Status.OVERFLOW, Status.MAX_TURNS, Status.TIME_LIMIT)


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
    """What the planner's last turn says, without thoughts and complete calls; the answer is looked
    for here, and the arguments of a call that was not executed are none."""


@dataclass(frozen=True, slots=True)
class _Ending:
    """How an agent's turns ended."""

    status: Status
    evidence: tuple[str, ...] = ()
    """Replies to the last turn that are not in the context."""


class Driver:
    """Runs episodes; holds no state of its own between them."""

    def __init__(self, roster: Roster, chat: Chat, tools: ToolBox, limits: EpisodeLimits) -> None:
        """All arguments are shared by all episodes of a run; the roster says how calls look."""
        self._roster = roster
        self._chat = chat
        self._tools = tools
        self._limits = limits

    async def run(self, sampler: Sampler, episode_id: str, system: str, task: str) -> EpisodeTree:
        """Run one episode to its end; failures of the infrastructure are statuses.

        Args:
            sampler: the policy, at the version that the step asks for.
            episode_id: unique; trajectories are `ID.p` and `ID.w0`, `ID.w1`, ...
            system: system message of the dataset row; used under `rollout.prompts: dataset`.
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
        self._grammar = roster.grammar
        self._chat = chat
        self._tools = tools
        self._limits = limits
        self._sampler = sampler
        self._id = episode_id
        self._workers: list[Conversation] = []

    async def run(self, system: str, task: str) -> EpisodeTree:
        lineage = Lineage(f"{self._id}.p", self._roster.planner, task)
        deadline = _deadline(self._roster.planner, math.inf)
        planner = Conversation(lineage, self._chat, system, deadline)
        status, error = await self._run_to_status(planner)
        said = visible_text(planner.last_said(), self._chat.opens_thinking)
        return EpisodeTree(
            planner.freeze(status, error),
            tuple(worker.freeze(status, error) for worker in self._workers),
            self._grammar.without_calls(said),
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
        ending = await self._loop(conversation)
        wanted = conversation.agent.final_summary
        if wanted == "always" or (wanted == "on_overflow" and ending.status in _SPENT):
            await self._summarise(conversation, ending)
        conversation.status = ending.status

    async def _loop(self, conversation: Conversation) -> _Ending:
        agent, config = conversation.agent, conversation.agent.config
        num_invalid = 0
        while True:
            room = self._room(conversation)
            if room < 1:
                return _Ending(Status.OVERFLOW)  # the prompt alone fills the context
            max_tokens = min(config.max_tokens_per_turn, room)
            text, is_cut = await self._sample(conversation, max_tokens)
            if is_cut:
                return _Ending(Status.OVERFLOW)
            calls = self._grammar.parse(text, agent.tools, self._chat.opens_thinking)
            calls = refuse_surplus(calls, config.max_calls_per_turn)
            records = _records(conversation, calls)
            conversation.calls.extend(records)
            if not calls:
                return _Ending(Status.ANSWERED)
            # By message: whoever mistakes the form of one call mistakes it in all of them.
            num_invalid += any(call.outcome is not CallOutcome.OK for call in calls)
            if num_invalid > config.max_invalid_calls:
                return _Ending(Status.INVALID_CALL)
            if conversation.num_model_turns >= config.max_turns:
                return _Ending(Status.MAX_TURNS)
            if conversation.is_out_of_time:
                return _Ending(Status.TIME_LIMIT)
            replies = await self._execute(conversation, calls, len(conversation.calls) - len(calls))
            if conversation.is_out_of_time:
                return _Ending(Status.TIME_LIMIT, tuple(replies))
            turn = conversation.environment(self._grammar.wrap(replies))
            if len(turn.token_ids) >= self._room(conversation):
                return _Ending(Status.OVERFLOW, tuple(replies))
            conversation.append_environment(turn)

    def _room(self, conversation: Conversation) -> int:
        """Tokens that may still be added, the reserve for a summary kept free."""
        agent = conversation.agent
        has_summary = agent.final_summary != "never"
        reserve = agent.config.summary_reserve_tokens if has_summary else 0
        return self._room_in_all(conversation) - reserve

    def _room_in_all(self, conversation: Conversation) -> int:
        """Tokens that may still be added, a summary included."""
        limit = conversation.agent.config.context_length or self._limits.context_tokens
        return limit - len(conversation.ids) - _SPARE_TOKENS

    async def _sample(self, conversation: Conversation, max_tokens: int) -> tuple[str, bool]:
        """Sample one turn: its text, and whether it was cut by length."""
        lineage_id = conversation.lineage.id
        with span(f"turn {conversation.num_model_turns + 1}", context=len(conversation.ids)):
            sampled = await self._sampler.sample(conversation.ids, max_tokens, lineage_id)
            note(tokens=len(sampled.token_ids), finish=sampled.finish_reason)
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
            self._run_call(conversation, call, worker, first_record, place)
            for place, (call, worker) in enumerate(zip(calls, workers, strict=True))
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
        deadline = _deadline(lineage.agent, parent.deadline)
        worker = Conversation(lineage, self._chat, "", deadline)
        self._workers.append(worker)
        return worker

    async def _run_call(
        self,
        conversation: Conversation,
        call: ParsedCall,
        worker: Conversation | None,
        first_record: int,
        place: int,
    ) -> str:
        """The reply to the `place`-th call of a turn; completes the call's record."""
        if call.outcome is not CallOutcome.OK:
            return prompts.correction(call, self._grammar)
        if worker is None:
            # Both names are from the agent's list of tools, or the call would not be OK.
            track = self._track(conversation, f"call {place + 1}" if place else "")
            with span(call.tool, track, server=call.server) as timed:
                answer = await self._tools.call(call.server, call.tool, call.arguments)
                note(is_error=answer.is_error)
            reply = answer.text
        else:
            with span(worker.agent.name, self._track(worker)) as timed:
                await self._run_agent(worker)
                note(status=str(worker.status), turns=worker.num_model_turns)
                reply = self._report(worker)
        index = first_record + place
        conversation.calls[index] = replace(
            conversation.calls[index],
            worker_id=worker.lineage.id if worker else "",
            duration_s=timed.seconds,
        )
        return reply

    def _track(self, conversation: Conversation, part: str = "") -> Track:
        """Where spans of an agent are shown, or of what it does at the same time (`part`)."""
        is_planner = conversation.agent.role is Role.PLANNER
        own = "" if is_planner else conversation.lineage.id.removeprefix(f"{self._id}.")
        return self._id, f"{own} {part}".strip()

    def _report(self, worker: Conversation) -> str:
        """What the planner reads: the worker's last message, without thoughts and calls."""
        said = visible_text(worker.last_said(), self._chat.opens_thinking)
        report = self._grammar.without_calls(said)
        if not report:
            return prompts.missing_report(str(worker.status))
        limit = self._limits.report_max_chars
        if len(report) <= limit:
            return report
        return report[:limit] + cut_mark(limit, len(report))

    async def _summarise(self, conversation: Conversation, ending: _Ending) -> None:
        """One more turn without tools, if the context still has room for it.

        The turn may use the whole reserve, and `max_tokens_per_turn` where the context has more.
        """
        if not conversation.is_sampled_last:
            return  # the prompt alone filled the context
        lineage = conversation.lineage
        if conversation.agent.role is Role.PLANNER:
            request = prompts.planner_summary(lineage.task, ending.status)
        else:
            request = prompts.worker_summary(lineage.task, lineage.subtask, ending.status)
        evidence = self._fitting_evidence(conversation, ending.evidence)
        turn = conversation.environment([*evidence, request])
        if evidence and len(turn.token_ids) >= self._room_in_all(conversation):
            turn = conversation.environment([request])  # the request is larger than the reserve
        config = conversation.agent.config
        most = max(config.max_tokens_per_turn, config.summary_reserve_tokens)
        room = self._room_in_all(conversation) - len(turn.token_ids)
        if room < 1:
            return
        conversation.append_environment(turn)
        await self._sample(conversation, min(most, room))

    def _fitting_evidence(self, conversation: Conversation, replies: Sequence[str]) -> list[str]:
        """User messages with as much of `replies` as the context takes beside the reserve."""
        if not replies:
            return []

        def num_tokens(candidates: Sequence[str]) -> int:
            return len(conversation.environment(self._grammar.wrap(candidates)).token_ids)

        kept = fit_replies(replies, self._room(conversation), num_tokens, self._chat)
        return self._grammar.wrap(kept) if kept else []


def _deadline(agent: Agent, of_planner: float) -> float:
    """`time.monotonic()` at which an agent that starts now has used up its time."""
    own = time.monotonic() + agent.config.timeout_s if agent.config.timeout_s else math.inf
    return min(own, of_planner)


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
