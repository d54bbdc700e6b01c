"""One context while it grows: an append-only list of turns, frozen into a `Trajectory` at the end.

Invariants: role, agent and parent never change; each turn follows the one that the policy saw.
"""

from __future__ import annotations

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

    def __init__(self, lineage: Lineage, chat: Chat, system: str) -> None:
        """Start with the rendered system and user messages."""
        self.lineage = lineage
        self.agent = lineage.agent
        self._chat = chat
        user = self.agent.user_message(lineage.task, lineage.subtask)
        ids, text = chat.initial_ids(self.agent.system_prompt(system), user)
        self.turns: list[Turn] = [Turn(TurnKind.PROMPT, ids, text)]
        self.ids: list[int] = list(ids)
        self.calls: list[CallRecord] = []
        self.num_model_turns = 0
        self.status: Status | None = None
        """Set when the agent is done."""

    @property
    def is_sampled_last(self) -> bool:
        """The last turn is the model's."""
        return self.turns[-1].kind is TurnKind.MODEL

    def append_sampled(self, sampled: Sampled) -> str:
        """Append what the engine returned as it is; return its text without the closing token."""
        ids = tuple(sampled.token_ids)
        text = self._chat.decode(ids)
        self._append(
            Turn(
                TurnKind.MODEL,
                ids,
                text,
                tuple(sampled.logprobs),
                tuple(sampled.versions),
                sampled.finish_reason,
            )
        )
        self.num_model_turns += 1
        return self._chat.visible(text)

    def environment(self, replies: Sequence[str]) -> Turn:
        """The turn that would carry `replies`; `append` it if it fits."""
        ids, text = self._chat.environment_ids(replies, self.turns[-1].token_ids)
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
