"""Conversations for supervised training, tokenized exactly as rollouts are."""

from __future__ import annotations

import json
import random
from pathlib import Path

from megatron_matpo.data.chat import Chat
from megatron_matpo.data.tokenizer import Tokenizer
from megatron_matpo.errors import DataError
from megatron_matpo.types import Role, TrainSample


def read_conversations(file: str, tokenizer: Tokenizer, max_tokens: int) -> list[TrainSample]:
    """Read JSONL: `{"id", "role": "planner"|"worker", "messages": [{"role", "content"}, ...]}`.

    Messages are an optional system message, then user messages and assistant turns; several user
    messages may follow each other. Loss is on assistant turns, their end-of-turn token included.

    Raises:
        DataError: names file, line and field.
    """
    chat = Chat(tokenizer)
    samples = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        where = f"sft.data={file}: line {number}"
        try:
            raw = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(raw, dict) or not isinstance(raw.get("messages"), list):
            raise DataError(f'{where}: expected an object with a list "messages"')
        identity = str(raw.get("id", number))
        sample = _to_sample(raw["messages"], identity, raw.get("role", "planner"), chat, tokenizer, where)
        if len(sample.input_ids) > max_tokens:
            raise DataError(
                f"{where}: {len(sample.input_ids)} tokens are more than "
                f"rollout.context_length={max_tokens}"
            )
        samples.append(sample)
    if not samples:
        raise DataError(f"sft.data={file}: no conversation in it")
    return samples


def _to_sample(
    messages: list[dict[str, str]],
    identity: str,
    role: str,
    chat: Chat,
    tokenizer: Tokenizer,
    where: str,
) -> TrainSample:
    if role not in (Role.PLANNER, Role.WORKER):
        raise DataError(f"{where}: role={role!r}; expected planner or worker")
    _check_messages(messages, where)
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    rest = messages[1:] if system else messages
    initial, _ = chat.initial_ids(system, rest[0]["content"])
    ids, mask = list(initial), [0] * len(initial)
    sampled: list[int] = []
    replies: list[str] = []
    for message in rest[1:]:
        if message["role"] == "user":
            replies.append(message["content"])
            continue
        if replies:
            between, _ = chat.environment_ids(replies, sampled)
            ids += between
            mask += [0] * len(between)
            replies = []
        sampled = [*tokenizer.encode(message["content"]), chat.end_of_turn_id]
        ids += sampled
        mask += [1] * len(sampled)
    return TrainSample(
        trajectory_id=identity,
        episode_id=identity,
        role=Role(role),
        input_ids=ids[:-1],
        labels=ids[1:],
        loss_mask=mask[1:],
        rollout_logprobs=[0.0] * (len(ids) - 1),
        advantage=0.0,
    )


def _check_messages(messages: list[dict[str, str]], where: str) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f'{where}: messages[{i}] needs the texts "role" and "content"')
    roles = [message.get("role") for message in messages]
    start = 1 if roles[:1] == ["system"] else 0
    if roles[start : start + 1] != ["user"] or roles[-1:] != ["assistant"]:
        raise DataError(
            f"{where}: roles {roles}; expected an optional system message, then a user message "
            "first and an assistant turn last"
        )
    for i in range(start, len(roles)):
        follows = roles[i] == "assistant" and roles[i - 1] == "assistant"
        if roles[i] not in ("user", "assistant") or follows:
            raise DataError(
                f"{where}: messages[{i}] has role {roles[i]!r}; expected user messages between "
                "assistant turns"
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
