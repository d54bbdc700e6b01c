"""Conversations for supervised training, tokenized exactly as rollouts are."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from megatron_matpo.data.chat import Chat
from megatron_matpo.data.tokenizer import Tokenizer
from megatron_matpo.errors import DataError
from megatron_matpo.types import Role, TrainSample


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


@dataclass(frozen=True)
class Conversation:
    """One line of the file, checked."""

    id: str
    role: Role
    system: str
    """Empty if there is no system message."""
    messages: tuple[Message, ...]
    """A user message, then assistant turns with user messages between them."""


def read_conversations(file: str, tokenizer: Tokenizer, max_tokens: int) -> list[TrainSample]:
    """Read JSONL: `{"id", "role": "planner"|"worker", "messages": [{"role", "content"}, ...]}`.

    Messages are an optional system message, one user message, then assistant turns with one or more
    user messages between them. Loss is on assistant turns, their end-of-turn token included.

    Raises:
        DataError: names file, line and field.
    """
    chat = Chat(tokenizer)
    samples: list[TrainSample] = []
    for number, line in enumerate(_lines(Path(file)), 1):
        where = f"sft.data={file}: line {number}"
        sample = _to_sample(_parse(line, str(number), where), chat, tokenizer)
        if len(sample.input_ids) > max_tokens:
            raise DataError(
                f"{where}: {len(sample.input_ids)} tokens are more than "
                f"rollout.context_length={max_tokens}"
            )
        samples.append(sample)
    if not samples:
        raise DataError(f"sft.data={file}: no conversation in it")
    return samples


def check_conversations(file: str) -> None:
    """Check the form of every line, without a tokenizer.

    Raises:
        DataError: names file, line and field.
    """
    for number, line in enumerate(_lines(Path(file)), 1):
        _parse(line, str(number), f"sft.data={file}: line {number}")


def _lines(path: Path) -> list[str]:
    """Lines of a JSONL file; `splitlines` would also cut at characters that strings may hold."""
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def _parse(line: str, default_id: str, where: str) -> Conversation:
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error})") from error
    fields = cast("dict[str, Any]", raw) if isinstance(raw, dict) else {}
    if not isinstance(fields.get("messages"), list):
        raise DataError(f'{where}: expected an object with a list "messages"')
    role = fields.get("role", Role.PLANNER)
    if role not in (Role.PLANNER, Role.WORKER):
        raise DataError(f"{where}: role={role!r}; expected planner or worker")
    messages = [_message(item, i, where) for i, item in enumerate(fields["messages"])]
    _check_order(messages, where)
    has_system = messages[0].role == "system"
    return Conversation(
        id=str(fields.get("id", default_id)),
        role=Role(role),
        system=messages[0].content if has_system else "",
        messages=tuple(messages[1:] if has_system else messages),
    )


def _message(raw: object, index: int, where: str) -> Message:
    fields = cast("dict[str, object]", raw) if isinstance(raw, dict) else {}
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f'{where}: messages[{index}] needs the texts "role" and "content"')
    return Message(role, content)


def _check_order(messages: list[Message], where: str) -> None:
    roles = [message.role for message in messages]
    start = 1 if roles[:1] == ["system"] else 0
    if roles[start : start + 2] != ["user", "assistant"] or roles[-1] != "assistant":
        raise DataError(
            f"{where}: roles {roles}; expected an optional system message, then one user message "
            "and an assistant turn first, and an assistant turn last"
        )
    for i in range(start, len(roles)):
        is_repeated = roles[i] == "assistant" and roles[i - 1] == "assistant"
        if roles[i] not in ("user", "assistant") or is_repeated:
            raise DataError(
                f"{where}: messages[{i}] has role {roles[i]!r}; expected user messages between "
                "assistant turns"
            )


def _to_sample(conversation: Conversation, chat: Chat, tokenizer: Tokenizer) -> TrainSample:
    first, *rest = conversation.messages
    initial, _ = chat.initial_ids(conversation.system, first.content)
    ids, mask = list(initial), [0] * len(initial)
    sampled: list[int] = []
    replies: list[str] = []
    for message in rest:
        if message.role == "user":
            replies.append(message.content)
            continue
        if sampled:
            between, _ = chat.environment_ids(replies, sampled)
            ids += between
            mask += [0] * len(between)
            replies = []
        sampled = [*tokenizer.encode(message.content), chat.end_of_turn_id]
        ids += sampled
        mask += [1] * len(sampled)
    return TrainSample(
        trajectory_id=conversation.id,
        episode_id=conversation.id,
        role=conversation.role,
        input_ids=ids[:-1],
        labels=ids[1:],
        loss_mask=mask[1:],
        rollout_logprobs=[0.0] * (len(ids) - 1),
        advantage=0.0,
    )


def batch_indices(num_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Rows of 1-based `step`: consecutive slices of an endless sequence of shuffled epochs.

    A function of its arguments alone, so that a resumed run needs no saved position.
    """
    rows: list[int] = []
    position = (step - 1) * batch_size
    while len(rows) < batch_size:
        epoch, offset = divmod(position + len(rows), num_rows)
        order = list(range(num_rows))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        rows += order[offset : offset + batch_size - len(rows)]
    return rows
