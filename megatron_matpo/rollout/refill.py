"""Dynamic sampling: a step's uninformative groups make way for groups of further questions.

Source: DAPO, arXiv:2503.14476, section 3.2, which over-samples and keeps filling until the batch
holds only groups with differing rewards. Differs: the number of rounds is bounded, and what is
still uninformative after the last one stays, so that a batch always has the same number of groups;
equal rewards count, not accuracies of exactly 0 or 1, because the format reward teaches too.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from megatron_matpo.types import Group

RunRound = Callable[[int, int], Awaitable[list[Group]]]
"""(first, count): run the questions `first` to `first + count - 1` of the step, from 0."""


@dataclass(frozen=True, slots=True)
class Collected:
    """The groups of a step, and what it took to get them."""

    groups: list[Group]
    discarded: list[Group] = field(default_factory=list[Group])
    """Uninformative ones that others replaced, in the order in which they were asked."""
    num_rounds: int = 1
    refill_s: float = 0.0
    """Of the rounds after the first."""

    @property
    def num_questions(self) -> int:
        """Questions asked in all: how far the step moved in the data."""
        return len(self.groups) + len(self.discarded)


async def collect_groups(run_round: RunRound, num_groups: int, max_rounds: int) -> Collected:
    """Run `num_groups` questions, then up to `max_rounds` rounds of replacements.

    A round asks as many further questions as there are uninformative groups, all at the same time,
    and puts them in the places of those, in order. So the result depends on the rewards alone, not
    on which episode ends first.

    Raises:
        RolloutError: whatever `run_round` raises.
    """
    collected = Collected(await run_round(0, num_groups))
    while collected.num_rounds <= max_rounds:
        places = [i for i, group in enumerate(collected.groups) if not group.is_informative]
        if not places:
            break
        start_s = time.monotonic()
        fresh = await run_round(collected.num_questions, len(places))
        refill_s = collected.refill_s + time.monotonic() - start_s
        groups = list(collected.groups)
        discarded = [*collected.discarded, *(groups[place] for place in places)]
        for place, group in zip(places, fresh, strict=True):
            groups[place] = group
        collected = Collected(groups, discarded, collected.num_rounds + 1, refill_s)
    return collected
