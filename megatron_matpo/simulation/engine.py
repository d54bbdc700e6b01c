"""One engine with continuous batching, as a fluid model between events.

All running sequences get one token per step, so a single counter of steps says how far each one is.
With b sequences whose contexts hold K tokens, a step takes

    step(b, K) = overhead + per_sequence b + max(weights(b) + kv K, compute b)      seconds

(weights and KV cache are read while products are computed; overhead and `per_sequence` are not
hidden). K grows by b per step; the time of k steps is the integral of step over them, in closed
form. A prefill stops decoding, as in SGLang: it takes all that wait and may be admitted, costs

    base + per_token n + per_pair (pairs of a new token with what it sees)

and gives each of its sequences the first token.

Invariants: never more running sequences than `max_running`; contexts, with what running sequences
will still sample, never above `kv_tokens`; requests are admitted in the order of their arrival.
Differs from SGLang: how long an answer gets is known when it is admitted, so nothing is ever
retracted; chunks of a prefill are not told apart.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
NEVER = math.inf


@dataclass(frozen=True)
class EngineRates:
    """Seconds that an engine needs, all GPUs of it together."""

    overhead_s: float = 0.0
    """Of a decode step, whatever it holds."""
    per_sequence_s: float = 0.0
    table: tuple[tuple[int, float], ...] = ()
    """(sequences, seconds of a step) by sequences, in place of the two above."""
    weights_s: float = 0.0
    """Reading all weights that every step needs."""
    experts_s: float = 0.0
    """Reading all experts."""
    expert_share: float = 1.0
    """Experts of a layer that one token uses, as a share."""
    kv_s: float = 0.0
    """Reading one token's keys and values."""
    compute_s: float = 0.0
    """Products of one token."""
    prefill_base_s: float = 0.0
    prefill_token_s: float = 0.0
    prefill_pair_s: float = 0.0
    request_s: float = 0.0
    """Outside of the engine, before every generation: HTTP, tokenizing, the manager."""

    def fixed_s(self, num_running: int) -> float:
        """The part of a step that is not hidden behind anything."""
        if self.table:
            return _interpolate(self.table, num_running)
        return self.overhead_s + self.per_sequence_s * num_running

    def read_s(self, num_running: int) -> float:
        """Reading the weights that a step of so many sequences needs."""
        if not self.experts_s:
            return self.weights_s
        # Experts that none of the sequences uses stay unread (tokens choose independently).
        return self.weights_s + self.experts_s * (1 - (1 - self.expert_share) ** num_running)

    def step_s(self, num_running: int, context_tokens: float) -> float:
        """One decode step."""
        memory = self.read_s(num_running) + self.kv_s * context_tokens
        return self.fixed_s(num_running) + max(memory, self.compute_s * num_running)

    def prefill_s(self, new_tokens: int, pairs: int) -> float:
        """One prefill."""
        return self.prefill_base_s + self.prefill_token_s * new_tokens + self.prefill_pair_s * pairs


def _interpolate(table: tuple[tuple[int, float], ...], size: int) -> float:
    """Linear between the table's rows; beyond its ends like the nearest two, never falling."""
    if len(table) == 1 or size <= table[0][0]:
        return table[0][1]
    place = min(max(1, bisect.bisect_left(table, (size, 0.0))), len(table) - 1)
    (left, low), (right, high) = table[place - 1], table[place]
    slope = (high - low) / (right - left)
    return max(low, low + slope * (size - left)) if size > right else low + slope * (size - left)


class Segment:
    """Decoding with a fixed set of sequences: steps to seconds and back."""

    __slots__ = ("compute", "crossing", "fixed", "memory", "slope")

    def __init__(self, rates: EngineRates, num_running: int, context_tokens: float) -> None:
        """`context_tokens` at the start, over all sequences."""
        self.fixed = rates.fixed_s(num_running)
        self.memory = rates.read_s(num_running) + rates.kv_s * context_tokens
        self.slope = rates.kv_s * num_running
        self.compute = rates.compute_s * num_running
        gap = self.compute - self.memory
        # Step at which reading begins to take longer than computing.
        self.crossing = 0.0 if gap <= 0 else gap / self.slope if self.slope else NEVER

    def seconds(self, steps: float) -> float:
        """Time of `steps` steps."""
        if steps <= self.crossing:
            return steps * (self.fixed + self.compute)
        rest = steps - self.crossing
        start = self.memory + self.slope * self.crossing
        before = self.crossing * (self.fixed + self.compute)
        return before + rest * (self.fixed + start) + self.slope * rest * rest / 2

    def steps(self, seconds: float) -> float:
        """Inverse of `seconds`."""
        flat = self.fixed + self.compute
        if self.crossing == NEVER:
            return seconds / flat if flat else NEVER
        before = self.crossing * flat
        if seconds <= before:
            return seconds / flat
        rest = seconds - before
        linear = self.fixed + self.memory + self.slope * self.crossing
        # Of slope/2 x^2 + linear x = rest; this form has no cancellation.
        root = linear + math.sqrt(linear * linear + 2 * self.slope * rest)
        return self.crossing + (2 * rest / root if root else NEVER)


@dataclass(slots=True)
class Request(Generic[T]):
    """A generation that is asked for."""

    owner: T
    context_tokens: int
    num_tokens: int
    new_tokens: int
    """Of the context, those that no cache holds: at least 1."""


@dataclass(slots=True)
class Usage:
    """Seconds and tokens of one engine."""

    decode_s: float = 0.0
    prefill_s: float = 0.0
    paused_s: float = 0.0
    """While weights are pushed."""
    sequence_s: float = 0.0
    """Integral of the running sequences over the time of decoding."""
    num_tokens: int = 0
    """Sampled."""
    prefill_tokens: int = 0
    last_end: float = 0.0
    """When its last generation ended."""
    max_running: int = 0
    max_kv_tokens: int = 0


class Engine(Generic[T]):
    """State of one engine; the caller owns the clock and asks for `next_event`."""

    def __init__(self, rates: EngineRates, max_running: int, kv_tokens: int) -> None:
        """`kv_tokens`: what its cache holds."""
        self._rates = rates
        self._max_running = max_running
        self._kv_tokens = kv_tokens
        self.usage = Usage()
        self.next_event = NEVER
        """When `fire` is to be called; changes with every call."""
        self.num_requests = 0
        """In flight: waiting, in the prefill or running."""
        self._waiting: deque[Request[T]] = deque()
        self._joining: list[Request[T]] = []
        self._running: list[tuple[float, int, Request[T]]] = []
        self._order = 0
        self._steps = 0.0
        self._context = 0.0
        self._reserved = 0
        self._since = 0.0
        self._segment: Segment | None = None
        self._is_blocked = False
        """In a prefill or a pause: nothing is decoded."""
        self._pause_wanted = 0.0

    def submit(self, now: float, request: Request[T]) -> None:
        """A new request."""
        self.num_requests += 1
        self._waiting.append(request)
        if not self._is_blocked:
            self._advance(now)
            self._go_on(now)

    def pause(self, now: float, seconds: float) -> None:
        """Stop for `seconds`, after a prefill that has begun; contexts stay in the cache."""
        self._pause_wanted += seconds
        if not self._is_blocked:
            self._advance(now)
            self._go_on(now)

    def fire(self, now: float) -> list[T]:
        """Let happen what happens now; returns the owners of generations that ended."""
        done: list[T] = []
        if self._is_blocked:
            self._is_blocked = False
            self._join(now, done)
        else:
            self._advance(now)
            # What is less than a millionth of a step away is rounding.
            while self._running and self._running[0][0] <= self._steps + 1e-6:
                _, _, request = heapq.heappop(self._running)
                self._context -= request.context_tokens + request.num_tokens
                self._finish(now, request, done)
            if not self._running:
                self._context = 0.0
        self._go_on(now)
        return done

    def _join(self, now: float, done: list[T]) -> None:
        for request in self._joining:
            if request.num_tokens <= 1:
                self._finish(now, request, done)
                continue
            self._context += request.context_tokens + 1
            self._order += 1
            end = self._steps + request.num_tokens - 1
            heapq.heappush(self._running, (end, self._order, request))
        self._joining = []

    def _finish(self, now: float, request: Request[T], done: list[T]) -> None:
        self.num_requests -= 1
        self._reserved -= request.context_tokens + request.num_tokens
        self.usage.num_tokens += request.num_tokens
        self.usage.last_end = now
        done.append(request.owner)

    def _advance(self, now: float) -> None:
        """Decode up to `now`."""
        if self._segment is not None:
            spent = now - self._since
            steps = self._segment.steps(spent)
            self._steps += steps
            self._context += steps * len(self._running)
            self.usage.decode_s += spent
            self.usage.sequence_s += spent * len(self._running)
            self._segment = None
        self._since = now

    def _go_on(self, now: float) -> None:
        """Choose what to do next: pause, prefill, decode, or nothing."""
        if self._pause_wanted:
            self._block(now, self._pause_wanted)
            self.usage.paused_s += self._pause_wanted
            self._pause_wanted = 0.0
        elif self._admit():
            new_tokens = sum(request.new_tokens for request in self._joining)
            pairs = sum(
                item.new_tokens * (2 * item.context_tokens - item.new_tokens + 1) // 2
                for item in self._joining
            )
            seconds = self._rates.prefill_s(new_tokens, pairs)
            self.usage.prefill_s += seconds
            self.usage.prefill_tokens += new_tokens
            self._block(now, seconds)
        elif self._running:
            self._segment = Segment(self._rates, len(self._running), self._context)
            self._since = now
            left = max(0.0, self._running[0][0] - self._steps)
            self.next_event = now + self._segment.seconds(left)
            if self.next_event == now:  # less than the clock can tell: it ends now
                self._steps = max(self._steps, self._running[0][0])
        else:
            self.next_event = NEVER

    def _block(self, now: float, seconds: float) -> None:
        self._is_blocked = True
        self.next_event = now + seconds

    def _admit(self) -> bool:
        """Move what may run from the queue into the prefill."""
        while self._waiting and len(self._running) + len(self._joining) < self._max_running:
            first = self._waiting[0]
            reserved = self._reserved + first.context_tokens + first.num_tokens
            if reserved > self._kv_tokens:
                break
            self._reserved = reserved
            self._joining.append(self._waiting.popleft())
        if self._joining:
            usage = self.usage
            usage.max_running = max(usage.max_running, len(self._running) + len(self._joining))
            usage.max_kv_tokens = max(usage.max_kv_tokens, self._reserved)
        return bool(self._joining)
