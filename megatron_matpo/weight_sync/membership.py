"""Which engines take part in a push, and who is told what became of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from megatron_matpo.types import PolicyVersion


class Member(NamedTuple):
    """One start of one engine."""

    index: int
    """Its place in the plan."""
    incarnation: int
    """Another number: it was started anew, and belongs to no process group."""


class Which(Enum):
    """Engines that are asked for."""

    ALL = "all"
    """Whatever is known of them; right at the start, when the trainer has just waited for all."""
    LIVING = "living"
    WAITING = "waiting"
    """Those that live and lack the present weights."""


class Membership(Protocol):
    """Asked and told on rank 0 only."""

    async def members(self, which: Which) -> list[Member]:
        """Engines in the order of the plan."""
        ...

    async def refit_began(self, indices: Sequence[int]) -> None:
        """They are about to be paused."""
        ...

    async def refitted(self, version: PolicyVersion, indices: Sequence[int]) -> None:
        """They hold `version`, verified, and are about to be resumed."""
        ...

    async def lost(self, reasons: Mapping[int, str]) -> None:
        """They do not answer, and should be started anew."""
        ...

    async def describe(self) -> str:
        """Every engine with its state, for an error."""
        ...


class FixedMembership:
    """All engines of the plan, less those that were lost; nobody starts any anew."""

    def __init__(self, num_engines: int) -> None:
        """Without a manager that knows better."""
        self._indices = list(range(num_engines))

    async def members(self, which: Which) -> list[Member]:
        """Nobody waits: what was lost does not come back."""
        return [] if which is Which.WAITING else [Member(index, 0) for index in self._indices]

    async def refit_began(self, indices: Sequence[int]) -> None:
        """Nobody to tell."""

    async def refitted(self, version: PolicyVersion, indices: Sequence[int]) -> None:
        """Nobody to tell."""

    async def lost(self, reasons: Mapping[int, str]) -> None:
        """Leave them out from now on."""
        self._indices = [index for index in self._indices if index not in reasons]

    async def describe(self) -> str:
        """Who is left."""
        return f"engines {self._indices} are left"


Agree = Callable[[bytes | None], bytes]
"""Rank 0's word on every rank; all call."""


def alone(word: bytes | None) -> bytes:
    """`Agree` of a trainer with one rank."""
    assert word is not None, "it is rank 0"
    return word


@dataclass(frozen=True)
class Recovery:
    """What can be done about engines that fail."""

    membership: Membership
    agree: Agree = alone
    retries: int = 0
    """`weight_sync.retries`"""
    answer_timeout_s: float = 10.0
    """`weight_sync.answer_timeout_s`"""
