"""What agents need of tools: their specifications, and a way to call them.

Invariants:

* what a tool has to say (also "no such page") is a `ToolReply` that the model reads;
* what the infrastructure has to say (server gone, deadline) is a `ToolError`: it ends the episode,
  which is then retried or left out, and never becomes a reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """One tool of one server, as a prompt lists it."""

    server: str
    name: str
    description: str
    input_schema: Mapping[str, Any]
    """JSON schema of the arguments; free-form, because tool servers write it."""


@dataclass(frozen=True, slots=True)
class ToolReply:
    """What the model reads after a call."""

    text: str
    is_error: bool
    """The tool itself reported an error (wrong arguments, page not found)."""


def cut_mark(num_shown: int, num_chars: int) -> str:
    """What stands after a text that was cut: the model sees that there was more."""
    return f"\n[... cut: {num_shown} of {num_chars} characters shown]"


class ToolBox(Protocol):
    """All tool servers of a run."""

    def specs(self) -> list[ToolSpec]:
        """All tools; the same list for the whole run."""
        ...

    async def call(self, server: str, tool: str, arguments: dict[str, Any]) -> ToolReply:
        """Run one call; many may be in flight.

        Raises:
            ToolError: the infrastructure failed.
        """
        ...
