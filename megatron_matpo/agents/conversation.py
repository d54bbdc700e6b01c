"""One context while it grows: an append-only list of turns, frozen into a `Trajectory` at the end.

Invariants: role, agent and parent never change; each turn follows the one that the policy saw.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_matpo.agents.grammar import format_score
from megatron_matpo.agents.roster import Agent
from megatron_matpo.agents.sampling import Sampled
from megatron_matpo.data.chat import Chat
from megatron_matpo.types import CallRecord, Status, Trajectory, Turn, TurnKind


@dataclass(frozen=True, slots=True)
class Lineage:
    """What identifies a trajectory and never changes."""

    id: str
    agent: Agent
    task: str
    """User message of the planner."""
    subtask: str = ""
    parent_id: str = ""
    spawn_turn: int = 0


class Conversation:
    """Turns of one agent."""

    def __init__(self, lineage: Lineage, chat: Chat, system: str, deadline: float) -> None:
        """Start with the rendered system and user messages.

        Args:
            lineage: who this is.
            chat: the policy's chat rendering.
            system: system message of the dataset row; empty for workers.
            deadline: `time.monotonic()` after which the agent makes no further turn.
        """
        self.lineage = lineage
        self.deadline = deadline
        self.agent = lineage.agent
        self._chat = chat
        user = self.agent.user_message(lineage.task, lineage.subtask)
        ids, text = chat.initial_ids(self.agent.system_prompt(system), user)
        self.turns: list[Turn] = [Turn(TurnKind.PROMPT, ids, text)]
        self.ids = array("i", ids)
        """The whole context; packed, as in `Turn`."""
        self.calls: list[CallRecord] = []
        self.num_model_turns = 0
        self.status: Status | None = None
        """Set when the agent is done."""

    @property
    def is_sampled_last(self) -> bool:
        """The last turn is the model's."""
        return self.turns[-1].kind is TurnKind.MODEL

    @property
    def is_out_of_time(self) -> bool:
        """The agent may make no further turn but its summary."""
        return time.monotonic() >= self.deadline

    def append_sampled(self, sampled: Sampled) -> str:
        """Append what the engine returned as it is; return its text without the closing token."""
        text = self._chat.decode(sampled.token_ids)
        self._append(
            Turn(
                TurnKind.MODEL,
                sampled.token_ids,
                text,
                sampled.logprobs,
                tuple(sampled.versions),
                sampled.finish_reason,
            )
        )
        self.num_model_turns += 1
        return self._chat.visible(text)

    def environment(self, messages: Sequence[str]) -> Turn:
        """The turn that would carry user `messages`; `append_environment` it if it fits."""
        ids, text = self._chat.environment_ids(messages, self.turns[-1].token_ids)
        return Turn(TurnKind.ENVIRONMENT, ids, text)

    def append_environment(self, turn: Turn) -> None:
        """Append what `environment` made."""
        assert turn.kind is TurnKind.ENVIRONMENT and self.is_sampled_last, "replies follow a sample"
        self._append(turn)

    def last_said(self) -> str:
        """Text of the last model turn without its closing token; empty if there is none."""
        for turn in reversed(self.turns):
            if turn.kind is TurnKind.MODEL:
                return self._chat.visible(turn.text)
        return ""

    def freeze(self, status: Status, error: str = "") -> Trajectory:
        """The record; `status` counts only if the agent was not done before."""
        return Trajectory(
            id=self.lineage.id,
            role=self.agent.role,
            agent=self.agent.name,
            parent_id=self.lineage.parent_id,
            spawn_turn=self.lineage.spawn_turn,
            turns=tuple(self.turns),
            status=self.status or status,
            format_score=format_score(call.outcome for call in self.calls),
            calls=tuple(self.calls),
            task=self.lineage.task,
            subtask=self.lineage.subtask,
            error="" if self.status else error,
        )

    def _append(self, turn: Turn) -> None:
        self.turns.append(turn)
        self.ids.extend(turn.token_ids)
