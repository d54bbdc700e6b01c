"""One continuation as SGLang (0.5.20) samples it: the request, and its answer read and checked.

An answer comes whole, or in parts while it is sampled (server-sent events). Parts are there so
that nothing sampled is lost with an engine: whoever has them can go on elsewhere. SGLang sends new
tokens only (`--incremental-streaming-output`) or all so far; both are understood.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from megatron_matpo.errors import EngineError
from megatron_matpo.types import VersionSpan

ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one continuation."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy. Log-probs are of the distribution after the temperature was applied."""
    top_p: float = 1.0
    top_k: int = -1
    """-1: all tokens. With `top_p < 1` or a `top_k`, SGLang's log-probs are still those of the
    whole distribution, not of the tokens that were left to sample from."""
    stop_token_ids: tuple[int, ...] = ()
    """In addition to the end-of-sequence tokens of the model's configuration."""
    stream_every: int = 0
    """Tokens of a part; 0: the answer comes whole."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One sampled continuation, as the engine returned it."""

    token_ids: array[int]
    """Sampled tokens (int32), the one that stopped it included."""
    logprobs: array[float]
    """Natural-log probability of each (float32) when it was sampled."""
    finish_reason: str
    """`stop`, `length` or `abort`."""
    versions: tuple[VersionSpan, ...]
    """Policy versions, covering all tokens."""


class BrokenGeneration(EngineError):
    """The engine failed in the middle of a generation; what it had sampled is here."""

    def __init__(self, cause: EngineError, sampled: Generation) -> None:
        """`sampled` ends with `abort` and has at least one token."""
        super().__init__(f"{cause} (after {len(sampled.token_ids)} tokens)")
        self.sampled = sampled


def request_body(input_ids: Sequence[int], params: SamplingParams) -> bytes:
    """The request as bytes: as objects, ids take eight times the memory while the engine samples.

    Every request carries a whole context; the standard library's encoder would take a third of the
    manager's time.
    """
    sampling: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "stop_token_ids": list(params.stop_token_ids),
    }
    body: dict[str, Any] = {
        "input_ids": input_ids.tolist() if isinstance(input_ids, array) else list(input_ids),
        "return_logprob": True,
        "sampling_params": sampling,
    }
    if params.stream_every:
        sampling["stream_interval"] = params.stream_every
        body["stream"] = True
    return orjson.dumps(body)


class GenerationReader:
    """Puts the parts of one answer together; a whole answer is one part."""

    def __init__(self) -> None:
        """Nothing was sampled yet."""
        self._token_ids: array[int] = array("i")
        self._logprobs: array[float] = array("f")
        self._versions: tuple[VersionSpan, ...] = ()
        self._last_version = 0
        self._finish_reason = ""

    @property
    def is_finished(self) -> bool:
        """The engine has said how it ended."""
        return bool(self._finish_reason)

    def add(self, part: dict[str, Any]) -> None:
        """Take one part, checked against itself and against those before.

        Raises:
            KeyError, TypeError, ValueError, IndexError, OverflowError: it is something else.
        """
        meta = part["meta_info"]
        if not isinstance(meta, dict):
            raise TypeError("meta_info is not an object")
        finish = meta["finish_reason"]
        if finish is None and self.is_finished:
            raise ValueError("a part came after the last one")
        reason = "" if finish is None else str(finish["type"])
        if finish is not None and finish.get("status_code"):
            raise ValueError(f"ended with an error: {finish.get('message')}")
        output_ids: list[int] = part["output_ids"]
        num_before, num_in_all = self._count(meta, output_ids)
        if reason == ABORT and num_before + len(output_ids) != num_in_all:
            # Ended while it waited to be scheduled again: SGLang then repeats the last token. What
            # was received is the beginning of what was sampled.
            self._finish_reason = reason
            return
        if num_before + len(output_ids) != num_in_all:
            raise ValueError(f"{num_in_all} completion_tokens, but {num_before} came before")
        rows = meta.get("output_token_logprobs") or ()
        if [row[1] for row in rows] != output_ids:
            raise ValueError("log-probs are of other tokens than output_ids")
        if min(output_ids, default=0) < 0:
            raise ValueError("negative token id")
        versions = self._read_versions(meta, num_before, len(output_ids))
        if sum(span.num_tokens for span in versions) != num_in_all:
            raise ValueError("weight_versions do not cover output_ids")
        ids, logprobs = array("i", output_ids), array("f", [row[0] for row in rows])
        self._token_ids = self._token_ids[:num_before] + ids
        self._logprobs = self._logprobs[:num_before] + logprobs
        self._versions, self._finish_reason = versions, reason

    def _count(self, meta: dict[str, Any], output_ids: list[int]) -> tuple[int, int]:
        """Tokens that come before this part's, and tokens so far."""
        num_before = len(self._token_ids)
        num_in_all = meta.get("completion_tokens", num_before + len(output_ids))
        if not isinstance(num_in_all, int):
            raise TypeError("completion_tokens is not a number")
        is_cumulative = num_in_all == len(output_ids)
        return (0 if is_cumulative else num_before), num_in_all

    def _read_versions(
        self, meta: dict[str, Any], num_before: int, num_tokens: int
    ) -> tuple[VersionSpan, ...]:
        """Versions of all tokens so far; numbers that this project's trainer gave, or none of ours.

        Only the last part tells them for every token. One before it tells the version when it was
        sent; if that has changed since the part before, its tokens count as the older.
        """
        if (spans := meta.get("weight_versions")) is not None:
            return tuple(
                VersionSpan(int(span["version"]), int(span["end"]) - int(span["start"]))
                for span in spans
            )
        if not num_tokens:
            return self._versions
        version = int(meta["weight_version"])
        older = min(version, self._last_version) if num_before else version
        self._last_version = version
        before = _first(self._versions, num_before)
        if before and before[-1].version == older:
            return (*before[:-1], VersionSpan(older, before[-1].num_tokens + num_tokens))
        return (*before, VersionSpan(older, num_tokens))

    def result(self) -> Generation:
        """What was sampled; `abort` if the engine did not say how it ended."""
        return Generation(
            self._token_ids,
            self._logprobs,
            self._finish_reason or ABORT,
            _first(self._versions, len(self._token_ids)),
        )


def _first(versions: Sequence[VersionSpan], num_tokens: int) -> tuple[VersionSpan, ...]:
    """The spans of the first `num_tokens` tokens."""
    kept: list[VersionSpan] = []
    for span in versions:
        left = num_tokens - sum(item.num_tokens for item in kept)
        if left > 0:
            kept.append(VersionSpan(span.version, min(span.num_tokens, left)))
    return tuple(kept)
