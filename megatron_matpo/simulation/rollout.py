"""Episodes on engines, tool servers and a judge: the event loop.

As the rollout manager does it (`rollout/scheduler.py`, `rollout/routing.py`): at most
`max_concurrent` episodes at a time, in the order of the questions; a conversation stays on the
engine that was least loaded when it began; calls of a turn run at the same time; a verdict is
waited for outside of the episode's place.

Left out: failures and retries, deadlines (episodes past theirs are counted), dynamic sampling.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_matpo.simulation.engine import NEVER, Engine, EngineRates, Request, Usage
from megatron_matpo.simulation.episodes import Agent

Action = Callable[[float], None]
"""What happens at an event; gets the time."""


@dataclass(frozen=True)
class Fleet:
    """What episodes run on."""

    num_engines: int
    rates: EngineRates
    max_running: int
    """Sequences of one engine."""
    kv_tokens: int
    """Cache of one engine."""
    max_concurrent: int = 1_000_000
    """Episodes."""
    tool_slots: int = 1_000_000
    """Calls in flight, over all tool servers."""
    judge_slots: int = 1_000_000
    prefix_hit: float = 1.0
    """Share of a conversation's earlier context that the engine still has."""
    prompt_hit: float = 0.0
    """Share of a first prompt that the engine has from other conversations."""


@dataclass
class StepRecord:
    """When a step's episodes ran."""

    released: float
    num_left: int
    judge_s: Sequence[float]
    started: dict[int, float] = field(default_factory=dict[int, float])
    durations: dict[int, float] = field(default_factory=dict[int, float])
    """By the episode's index; without the judge, as `duration_s` of the recorder."""
    ends: list[float] = field(default_factory=list[float])
    """Of episodes, verdict included."""
    done: float = NEVER


class Station:
    """Servers with a queue: at most `num_slots` jobs at a time, first come, first served."""

    def __init__(self, loop: Rollout, num_slots: int) -> None:
        """`loop` wakes it up."""
        self._loop = loop
        self._free = num_slots
        self._queue: deque[tuple[float, float, Action]] = deque()
        self.busy_s = 0.0
        self.waited_s = 0.0
        """Sum over jobs."""
        self.num_jobs = 0

    def start(self, now: float, seconds: float, then: Action) -> None:
        """Run a job of `seconds` when there is a slot."""
        self._queue.append((now, seconds, then))
        self._serve(now)

    def _serve(self, now: float) -> None:
        while self._free and self._queue:
            since, seconds, then = self._queue.popleft()
            self._free -= 1
            self.num_jobs += 1
            self.busy_s += seconds
            self.waited_s += now - since
            self._loop.at(now + seconds, self._ender(then))

    def _ender(self, then: Action) -> Action:
        def end(now: float) -> None:
            self._free += 1
            self._serve(now)
            then(now)

        return end


@dataclass(slots=True)
class _Conversation:
    """State of one context."""

    agent: Agent
    step: int
    episode: int
    parent: _Conversation | None
    engine: int = -1
    turn: int = 0
    context_tokens: int = 0
    num_pending: int = 0
    """Calls that the next turn waits for."""


class Rollout:
    """The loop. Steps are released into it; whoever waits for one is told (`on_done`)."""

    def __init__(self, fleet: Fleet, on_done: Callable[[int, float], None] | None = None) -> None:
        """`on_done(step, time)`: all episodes of a step have ended and are graded."""
        self._fleet = fleet
        self._on_done = on_done
        self.engines: list[Engine[_Conversation]] = [
            Engine(fleet.rates, fleet.max_running, fleet.kv_tokens)
            for _ in range(fleet.num_engines)
        ]
        self.tools = Station(self, fleet.tool_slots)
        self.judge = Station(self, fleet.judge_slots)
        self.steps: dict[int, StepRecord] = {}
        self._num_running = 0
        self._gate: deque[tuple[int, int, Agent]] = deque()
        self._heap: list[tuple[float, int, int, Action | None]] = []
        self._count = itertools.count()
        self._expected = [NEVER] * fleet.num_engines
        """Time of the event in the heap that still holds, by engine."""
        self._open_tokens = [0] * fleet.num_engines
        self.max_open_tokens = 0
        """Most tokens of conversations that have not ended, on one engine: what its prefix cache
        would have to hold."""

    @property
    def usages(self) -> list[Usage]:
        """Of all engines."""
        return [engine.usage for engine in self.engines]

    def at(self, when: float, action: Action) -> None:
        """Call `action` at a time."""
        heapq.heappush(self._heap, (when, next(self._count), -1, action))

    def release(
        self, now: float, step: int, episodes: Sequence[Agent], judge_s: Sequence[float] = ()
    ) -> None:
        """A step's episodes may begin; `judge_s` has one entry per episode, or none at all."""
        self.steps[step] = StepRecord(now, len(episodes), judge_s)
        self._gate.extend((step, index, agent) for index, agent in enumerate(episodes))
        self._let_in(now)

    def pause(self, now: float, seconds: float) -> None:
        """All engines stop for a weight push."""
        for index, engine in enumerate(self.engines):
            engine.pause(now, seconds)
            self._watch(index)

    def run(self) -> None:
        """Until nothing is left to happen."""
        heap = self._heap
        while heap:
            now, _, index, action = heapq.heappop(heap)
            if action is not None:
                action(now)
            elif now == self._expected[index]:
                self._expected[index] = NEVER
                ended = self.engines[index].fire(now)
                self._watch(index)
                for conversation in ended:
                    self._generated(now, conversation)

    def _watch(self, index: int) -> None:
        when = self.engines[index].next_event
        if when != self._expected[index]:
            self._expected[index] = when
            if when != NEVER:
                heapq.heappush(self._heap, (when, next(self._count), index, None))

    def _let_in(self, now: float) -> None:
        while self._gate and self._num_running < self._fleet.max_concurrent:
            step, index, agent = self._gate.popleft()
            self._num_running += 1
            self.steps[step].started[index] = now
            self._begin(now, _Conversation(agent, step, index, None))

    def _begin(self, now: float, conversation: _Conversation) -> None:
        conversation.context_tokens = conversation.agent.prompt_tokens
        hit = int(self._fleet.prompt_hit * conversation.agent.prompt_tokens)
        self._ask(now, conversation, conversation.agent.prompt_tokens - hit)

    def _ask(self, now: float, conversation: _Conversation, new_tokens: int) -> None:
        """Submit the next generation, after what the manager needs."""
        pause = self._fleet.rates.request_s
        if pause:
            self.at(now + pause, lambda when: self._submit(when, conversation, new_tokens))
        else:
            self._submit(now, conversation, new_tokens)

    def _submit(self, now: float, conversation: _Conversation, new_tokens: int) -> None:
        if conversation.engine < 0:
            loads = [engine.num_requests for engine in self.engines]
            conversation.engine = loads.index(min(loads))
            self._open(conversation, conversation.context_tokens)
        tokens = conversation.agent.turns[conversation.turn].num_tokens
        request = Request(conversation, conversation.context_tokens, tokens, max(1, new_tokens))
        self.engines[conversation.engine].submit(now, request)
        self._watch(conversation.engine)

    def _open(self, conversation: _Conversation, num_tokens: int) -> None:
        held = self._open_tokens[conversation.engine] + num_tokens
        self._open_tokens[conversation.engine] = held
        self.max_open_tokens = max(self.max_open_tokens, held)

    def _generated(self, now: float, conversation: _Conversation) -> None:
        turn = conversation.agent.turns[conversation.turn]
        conversation.context_tokens += turn.num_tokens
        self._open(conversation, turn.num_tokens)
        if conversation.turn + 1 == len(conversation.agent.turns) and not (
            turn.tools_s or turn.workers
        ):
            self._end(now, conversation)
            return
        conversation.num_pending = len(turn.tools_s) + len(turn.workers)
        if not conversation.num_pending:
            self._next_turn(now, conversation)
            return
        for seconds in turn.tools_s:
            self.tools.start(now, seconds, lambda when: self._answered(when, conversation))
        for worker in turn.workers:
            child = _Conversation(worker, conversation.step, conversation.episode, conversation)
            self._begin(now, child)

    def _answered(self, now: float, conversation: _Conversation) -> None:
        conversation.num_pending -= 1
        if not conversation.num_pending:
            self._next_turn(now, conversation)

    def _next_turn(self, now: float, conversation: _Conversation) -> None:
        if conversation.turn + 1 == len(conversation.agent.turns):
            self._end(now, conversation)
            return
        reply = conversation.agent.turns[conversation.turn].reply_tokens
        lost = conversation.context_tokens * (1 - self._fleet.prefix_hit)
        conversation.context_tokens += reply
        self._open(conversation, reply)
        conversation.turn += 1
        self._ask(now, conversation, reply + round(lost))

    def _end(self, now: float, conversation: _Conversation) -> None:
        self._open(conversation, -conversation.context_tokens)
        if conversation.parent is not None:
            self._answered(now, conversation.parent)
            return
        step, index = conversation.step, conversation.episode
        record = self.steps[step]
        record.durations[index] = now - record.started[index]
        self._num_running -= 1
        self._let_in(now)
        if record.judge_s:
            self.judge.start(now, record.judge_s[index], lambda when: self._graded(when, step))
        else:
            self._graded(now, step)

    def _graded(self, now: float, step: int) -> None:
        record = self.steps[step]
        record.ends.append(now)
        record.num_left -= 1
        if not record.num_left:
            record.done = now
            if self._on_done:
                self._on_done(step, now)


def run_step(fleet: Fleet, episodes: Sequence[Agent], judge_s: Sequence[float] = ()) -> Rollout:
    """One step by itself, from time 0; its record is `steps[1]`."""
    rollout = Rollout(fleet)
    rollout.release(0.0, 1, episodes, judge_s)
    rollout.run()
    return rollout
