"""Asynchronous client of one SGLang server (0.5.20): tokens in, tokens out, and control verbs.

Invariants:

* every request has a deadline (seconds), and the error of a missed one names it;
* three failures are told apart: no connection (`EngineUnreachable`), no answer in time
  (`EngineTimeout`), an answer that is an error or not the protocol (`EngineRejected`);
* nothing is retried here: whoever knows whether a repetition is harmless repeats;
* no text: `input_ids` go in, sampled ids and their log-probs come out, checked against each other;
* no answer is read past `_MAX_ANSWER_BYTES`, whatever the server sends.

A request that is cancelled or runs into its deadline closes its connection, and SGLang aborts it.
"""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import orjson

from megatron_matpo.errors import EngineError, EngineRejected, EngineTimeout, EngineUnreachable
from megatron_matpo.types import VersionSpan

PauseMode = Literal["abort", "retract", "in_place"]

_POLL_S = 0.25
_KEEPALIVE_S = 2.0
_HEALTH_LIMIT_S = 10.0
_SHOWN_CHARS = 500
# A sampled token takes about 50 bytes; of a longer answer the rest is not even read.
_MAX_ANSWER_BYTES = 16 * 2**20


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


class EngineClient:
    """One server. Use it from one event loop; `close` it there."""

    def __init__(self, url: str, api_key: str = "", *, request_timeout_s: float = 600.0) -> None:
        """Connect lazily to `url` (no trailing slash); `request_timeout_s` bounds a generation."""
        self.url = url
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._request_timeout_s = request_timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def generate(self, input_ids: Sequence[int], params: SamplingParams) -> Generation:
        """Sample one continuation of `input_ids`.

        Raises:
            EngineUnreachable: no connection, or it broke.
            EngineTimeout: nothing complete inside `request_timeout_s`.
            EngineRejected: an HTTP error, or an answer that does not account for its tokens.
        """
        body = _generate_body(input_ids, params)
        answer = await self._ask_json(
            "POST", "/generate", body, self._request_timeout_s, "rollout.request_timeout_s"
        )
        try:
            return _read_generation(answer)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise EngineRejected(
                f"{self.url}/generate: not a generation ({error!r}): {_shown(answer)}"
            ) from error

    async def health_generate(self, *, deadline_s: float = _HEALTH_LIMIT_S) -> None:
        """Return if the engine generates, or is busy generating; an open port is not enough.

        Takes at least a second, because SGLang looks once a second.

        Raises:
            EngineError: it does not; a server that still starts answers 503 (`EngineRejected`).
        """
        await self._ask("GET", "/health_generate", None, deadline_s)

    async def wait_ready(
        self, *, deadline_s: float, process_alive: Callable[[], bool] = lambda: True
    ) -> None:
        """Return when the engine generates.

        Args:
            deadline_s: from now, for the whole wait.
            process_alive: whether the server's process still runs; asked between attempts.

        Raises:
            EngineUnreachable: the process ended.
            EngineTimeout: not ready in time; the message holds the last reason.
        """
        end = time.monotonic() + deadline_s
        reason = "not asked yet"
        while (left_s := end - time.monotonic()) > 0:
            if not process_alive():
                raise EngineUnreachable(f"{self.url}: the server's process ended before it served")
            try:
                await self.health_generate(deadline_s=min(left_s, _HEALTH_LIMIT_S))
                return
            except EngineError as error:
                reason = str(error)
            await asyncio.sleep(_POLL_S)
        raise EngineTimeout(f"{self.url}: not ready after {deadline_s:g} s; last: {reason}")

    async def info(self, *, deadline_s: float = 10.0) -> dict[str, Any]:
        """What the engine serves: `model_path`, `weight_version`, `model_type` and more.

        Raises:
            EngineError: as `generate`.
        """
        return await self._ask_json("GET", "/model_info", None, deadline_s)

    async def weight_version(self, *, deadline_s: float) -> str:
        """The version that the engine says it serves.

        Raises:
            EngineError: as `generate`.
        """
        answer = await self.info(deadline_s=deadline_s)
        if not isinstance(version := answer.get("weight_version"), str):
            raise EngineRejected(f"{self.url}/model_info: no weight_version in {_shown(answer)}")
        return version

    async def pause(self, *, mode: PauseMode = "retract", deadline_s: float) -> None:
        """Stop sampling; control requests are still served.

        `abort` ends running requests with what they have; `retract` puts them back into the queue
        and forgets their KV cache; `in_place` freezes them with it (the cache then cannot be
        flushed).

        Raises:
            EngineError: as `generate`.
        """
        await self._ask("POST", "/pause_generation", orjson.dumps({"mode": mode}), deadline_s)

    async def resume(self, *, deadline_s: float) -> None:
        """Sample again after `pause`.

        Raises:
            EngineError: as `generate`.
        """
        await self._ask("POST", "/continue_generation", b"{}", deadline_s)

    async def flush_cache(self, *, deadline_s: float) -> None:
        """Forget all cached prefixes.

        Raises:
            EngineRejected: requests are running or waiting.
            EngineError: as `generate`.
        """
        await self._ask("POST", "/flush_cache", b"{}", deadline_s)

    async def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
        deadline_s: float,
    ) -> None:
        """Make the engine's ranks join a process group as ranks `rank_offset`...

        Answers when all members have joined, so the caller joins meanwhile.

        Raises:
            EngineError: as `generate`.
        """
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        await self._command("/init_weights_update_group", body, deadline_s)

    async def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        weight_version: str | None,
        load_format: str | None,
        flush_cache: bool,
        deadline_s: float,
    ) -> None:
        """Make the engine receive these tensors from rank 0 of the group and load them.

        Args:
            names: Hugging Face's names.
            dtypes: as torch spells them without its prefix.
            shapes: unsharded.
            group_name: as at `init_weights_update_group`.
            weight_version: what the engine calls its weights from now on; None leaves it. It holds
                at once, so of a push in several buckets only the last should carry it.
            load_format: `flattened_bucket` if the tensors come as one broadcast of their bytes;
                None if each has its own broadcast.
            flush_cache: forget cached prefixes afterwards; they belong to the old weights.
            deadline_s: for the whole transfer (seconds).

        Raises:
            EngineError: as `generate`.
        """
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "weight_version": weight_version,
            "load_format": load_format,
            "flush_cache": flush_cache,
        }
        await self._command("/update_weights_from_distributed", body, deadline_s)

    async def destroy_weights_update_group(self, *, group_name: str, deadline_s: float) -> None:
        """Make the engine leave the group.

        Raises:
            EngineError: as `generate`.
        """
        body = {"group_name": group_name}
        await self._command("/destroy_weights_update_group", body, deadline_s)

    async def close(self) -> None:
        """Close the connections; running requests are aborted. May be called twice."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _command(self, path: str, body: dict[str, Any], deadline_s: float) -> None:
        """A verb whose answer says whether it succeeded."""
        answer = await self._ask_json("POST", path, orjson.dumps(body), deadline_s)
        if answer.get("success") is not True:
            raise EngineRejected(f"{self.url}{path}: {_shown(answer)}")

    async def _ask_json(
        self,
        method: str,
        path: str,
        body: bytes | None,
        deadline_s: float,
        setting: str = "deadline_s",
    ) -> dict[str, Any]:
        data = await self._ask(method, path, body, deadline_s, setting)
        try:
            answer = orjson.loads(data)
        except ValueError as error:
            raise EngineRejected(f"{self.url}{path}: not JSON: {_shown(data)}") from error
        if not isinstance(answer, dict):
            raise EngineRejected(f"{self.url}{path}: not a JSON object: {_shown(data)}")
        return answer

    async def _ask(
        self,
        method: str,
        path: str,
        body: bytes | None,
        deadline_s: float,
        setting: str = "deadline_s",
    ) -> bytes:
        """The body of a 200 answer."""
        if self._session is None:
            # No limit on connections: the manager bounds its requests, and a health check must not
            # queue behind generations.
            # Idle connections are dropped before SGLang drops them (5 s): a request on one that is
            # just being closed would fail, and a generation is not sent twice.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
            self._session = aiohttp.ClientSession(
                connector=connector, headers=self._headers, cookie_jar=aiohttp.DummyCookieJar()
            )
        started = time.monotonic()
        try:
            async with self._session.request(
                method, self.url + path, data=body, timeout=aiohttp.ClientTimeout(total=deadline_s)
            ) as response:
                data = await self._read(response, path)
        except TimeoutError as error:
            raise EngineTimeout(
                f"{self.url}{path}: no complete answer after {time.monotonic() - started:.1f} s "
                f"({setting}={deadline_s:g})"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnreachable(
                f"{self.url}{path}: {error or type(error).__name__} "
                f"(after {time.monotonic() - started:.1f} s of {setting}={deadline_s:g})"
            ) from error
        if response.status != 200:
            raise EngineRejected(f"{self.url}{path}: HTTP {response.status}: {_shown(data)}")
        return data

    async def _read(self, response: aiohttp.ClientResponse, path: str) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in response.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > _MAX_ANSWER_BYTES:
                response.close()  # else leaving the request would read on
                raise EngineRejected(
                    f"{self.url}{path}: the answer is longer than {_MAX_ANSWER_BYTES >> 20} MiB"
                )
        return b"".join(parts)


def _generate_body(input_ids: Sequence[int], params: SamplingParams) -> bytes:
    """The request as bytes: as objects, ids take eight times the memory while the engine samples.

    Every request carries a whole context; the standard library's encoder would take a third of the
    manager's time.
    """
    return orjson.dumps(
        {
            "input_ids": input_ids.tolist() if isinstance(input_ids, array) else list(input_ids),
            "return_logprob": True,
            "sampling_params": {
                "max_new_tokens": params.max_new_tokens,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
                "stop_token_ids": list(params.stop_token_ids),
            },
        }
    )


def _read_generation(answer: dict[str, Any]) -> Generation:
    """Check the answer's parts against each other.

    Raises:
        KeyError, TypeError, ValueError, IndexError, OverflowError: it is something else.
    """
    meta = answer["meta_info"]
    if not isinstance(meta, dict):
        raise TypeError("meta_info is not an object")
    rows = meta.get("output_token_logprobs") or ()
    output_ids: list[int] = answer["output_ids"]
    if [row[1] for row in rows] != output_ids:
        raise ValueError("log-probs are of other tokens than output_ids")
    if min(output_ids, default=0) < 0:
        raise ValueError("negative token id")
    # Versions are the numbers that this project's trainer gave; another text is not ours to serve.
    versions = tuple(
        VersionSpan(int(span["version"]), int(span["end"]) - int(span["start"]))
        for span in meta.get("weight_versions") or ()
    )
    if sum(span.num_tokens for span in versions) != len(output_ids):
        raise ValueError("weight_versions do not cover output_ids")
    return Generation(
        token_ids=array("i", output_ids),
        logprobs=array("f", [row[0] for row in rows]),
        finish_reason=str(meta["finish_reason"]["type"]),
        versions=versions,
    )


def _shown(answer: bytes | dict[str, Any]) -> str:
    """As much of an answer as fits an error message."""
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    text = data[:_SHOWN_CHARS].decode(errors="replace")
    return text if len(data) <= _SHOWN_CHARS else text + "..."
