"""One turn that is sampled in several pieces: an engine paused or failed, and the rest came later.

Invariants:

* what was sampled is never sampled again: the next piece continues from the last token;
* every token keeps the log-prob and the policy version with which it was sampled.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from megatron_matpo.agents.sampling import Sampled
from megatron_matpo.rollout.generation import Generation
from megatron_matpo.types import VersionSpan


class Continuation:
    """The turn so far."""

    def __init__(self, max_tokens: int, stop_token_ids: Sequence[int]) -> None:
        """A turn of at most `max_tokens` that also ends with one of `stop_token_ids`."""
        self._max_tokens, self._stop_token_ids = max_tokens, frozenset(stop_token_ids)
        self._token_ids: array[int] = array("i")
        self._logprobs: array[float] = array("f")
        self._versions: list[VersionSpan] = []
        self.num_pieces = 0

    @property
    def num_left(self) -> int:
        """Tokens that may still be sampled."""
        return self._max_tokens - len(self._token_ids)

    def context(self, ids: Sequence[int]) -> Sequence[int]:
        """What the next piece continues: `ids` and what was sampled after them."""
        return [*ids, *self._token_ids] if self._token_ids else ids

    def add(self, piece: Sampled) -> str:
        """Take a piece; returns `stop`, `length`, or `abort` if the turn is to be continued.

        An engine that is told to abort does so before it looks whether the last token ends the
        turn, so that is done here.
        """
        if not piece.token_ids:
            return piece.finish_reason
        self.num_pieces += 1
        self._token_ids.extend(piece.token_ids)
        self._logprobs.extend(piece.logprobs)
        for span in piece.versions:
            last = self._versions[-1] if self._versions else None
            if last is not None and last.version == span.version:
                total = last.num_tokens + span.num_tokens
                self._versions[-1] = VersionSpan(span.version, total)
            else:
                self._versions.append(span)
        if piece.finish_reason != "abort":
            return piece.finish_reason
        if self._token_ids[-1] in self._stop_token_ids:
            return "stop"
        return "length" if self.num_left <= 0 else "abort"

    def result(self, finish_reason: str) -> Generation:
        """The whole turn."""
        return Generation(self._token_ids, self._logprobs, finish_reason, tuple(self._versions))
