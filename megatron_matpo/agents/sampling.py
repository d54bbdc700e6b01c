"""What agents need of an engine: continue these tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_matpo.types import VersionSpan


class Sampled(Protocol):
    """One generation, as the engine returned it."""

    @property
    def token_ids(self) -> Sequence[int]:
        """Sampled tokens, the one that ended the turn included."""
        ...

    @property
    def logprobs(self) -> Sequence[float]:
        """Natural-log probability of each, under the distribution that sampled it."""
        ...

    @property
    def finish_reason(self) -> str:
        """`stop` or `length`."""
        ...

    @property
    def versions(self) -> Sequence[VersionSpan]:
        """Policy versions, covering all tokens."""
        ...


class Sampler(Protocol):
    """The policy. Knows its sampling parameters and which policy version it has to be."""

    async def sample(self, ids: Sequence[int], max_tokens: int, conversation_id: str) -> Sampled:
        """Continue `ids` by at most `max_tokens` tokens, at least 1.

        Args:
            ids: the whole context so far.
            max_tokens: longer turns end with `finish_reason == "length"`.
            conversation_id: equal for all turns of one trajectory (prefix cache).

        Raises:
            EngineError: no engine could do it.
        """
        ...
