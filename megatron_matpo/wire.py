"""A rollout batch as bytes: what the manager sends, what is recorded, and what replay reads.

Layout: 8-byte magic, 8-byte little-endian header length, a JSON header, then all token ids as
little-endian int32 and all log-probs as float32, in the order of the turns. No pickle: the reader
executes nothing that it reads. Log-probs are rounded to float32, which is what engines compute.
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_matpo.errors import DataError
from megatron_matpo.types import (
    CallRecord,
    Episode,
    Group,
    Reward,
    Role,
    RolloutBatch,
    Status,
    Trajectory,
    Turn,
    TurnKind,
    VersionSpan,
)

MAGIC = b"MATPOR02"
_LENGTH = struct.Struct("<Q")


def _plain(item: Trajectory | Episode | Group, *left_out: str) -> dict[str, Any]:
    return {name: getattr(item, name) for name in type(item).__slots__ if name not in left_out}


def encode(batch: RolloutBatch) -> bytes:
    """Serialise `batch`."""
    tokens, logprobs = array("i"), array("f")

    def trajectory(item: Trajectory) -> dict[str, Any]:
        turns: list[dict[str, Any]] = []
        for turn in item.turns:
            tokens.extend(turn.token_ids)
            logprobs.extend(turn.logprobs)
            turns.append(
                {
                    "kind": turn.kind,
                    "num_tokens": len(turn.token_ids),
                    "text": turn.text,
                    "versions": [(span.version, span.num_tokens) for span in turn.versions],
                    "finish_reason": turn.finish_reason,
                }
            )
        calls = [asdict(call) for call in item.calls]
        return _plain(item, "turns", "calls") | {"turns": turns, "calls": calls}

    def episode(item: Episode) -> dict[str, Any]:
        return _plain(item, "planner", "workers", "reward") | {
            "planner": trajectory(item.planner),
            "workers": [trajectory(worker) for worker in item.workers],
            "reward": None if item.reward is None else asdict(item.reward),
        }

    groups = [
        _plain(group, "episodes") | {"episodes": [episode(item) for item in group.episodes]}
        for group in batch.groups
    ]
    header = json.dumps(
        {
            "step": batch.step,
            "policy_version": batch.policy_version,
            "metrics": batch.metrics,
            "next_position": batch.next_position,
            "num_tokens": len(tokens),
            "num_logprobs": len(logprobs),
            "groups": groups,
        },
        ensure_ascii=False,
        separators=(",", ":"),
    ).encode()
    if sys.byteorder == "big":
        tokens.byteswap()
        logprobs.byteswap()
    return b"".join(
        (MAGIC, _LENGTH.pack(len(header)), header, tokens.tobytes(), logprobs.tobytes())
    )


def decode(data: bytes, source: str = "rollout batch") -> RolloutBatch:
    """Inverse of `encode`.

    Raises:
        DataError: not such a file, or cut short; names `source`.
    """
    start = len(MAGIC) + _LENGTH.size
    if data[: len(MAGIC)] != MAGIC or len(data) < start:
        raise DataError(f"{source}: not a recorded rollout (expected it to start with {MAGIC!r})")
    (header_length,) = _LENGTH.unpack(data[len(MAGIC) : start])
    try:
        header = json.loads(data[start : start + header_length])
    except ValueError as error:
        raise DataError(f"{source}: damaged or cut short in its header") from error
    tokens, logprobs = array("i"), array("f")
    first_logprob = start + header_length + 4 * header["num_tokens"]
    if len(data) != first_logprob + 4 * header["num_logprobs"]:
        raise DataError(f"{source}: has {len(data)} bytes, which is not what its header says")
    tokens.frombytes(data[start + header_length : first_logprob])
    logprobs.frombytes(data[first_logprob:])
    if sys.byteorder == "big":
        tokens.byteswap()
        logprobs.byteswap()
    at_token = at_logprob = 0

    def trajectory(raw: dict[str, Any]) -> Trajectory:
        nonlocal at_token, at_logprob
        turns: list[Turn] = []
        for item in raw.pop("turns"):
            kind, count = TurnKind(item["kind"]), item["num_tokens"]
            ids = tokens[at_token : at_token + count]
            at_token += count
            values: Sequence[float] = ()
            if kind is TurnKind.MODEL:
                values = logprobs[at_logprob : at_logprob + count]
                at_logprob += count
            spans = tuple(VersionSpan(*span) for span in item["versions"])
            turns.append(Turn(kind, ids, item["text"], values, spans, item["finish_reason"]))
        calls = tuple(CallRecord(**call) for call in raw.pop("calls"))
        role, status = Role(raw.pop("role")), Status(raw.pop("status"))
        return Trajectory(role=role, status=status, turns=tuple(turns), calls=calls, **raw)

    def episode(raw: dict[str, Any]) -> Episode:
        planner = trajectory(raw.pop("planner"))
        workers = tuple(trajectory(worker) for worker in raw.pop("workers"))
        reward = raw.pop("reward")
        return Episode(
            planner=planner,
            workers=workers,
            reward=None if reward is None else Reward(**reward),
            **raw,
        )

    groups = tuple(
        Group(episodes=tuple(episode(item) for item in raw.pop("episodes")), **raw)
        for raw in header["groups"]
    )
    plain = ("step", "policy_version", "metrics", "next_position")
    return RolloutBatch(groups=groups, **{name: header[name] for name in plain})


def recording_path(folder: Path, step: int) -> Path:
    """File that holds the recorded batch of `step`."""
    return folder / f"step_{step:06d}.rollout"
