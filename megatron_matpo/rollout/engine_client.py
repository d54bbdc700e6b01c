"""Asynchronous client of one SGLang server (0.5.20): tokens in, tokens out, and control verbs.

No text: `input_ids` go in, sampled ids and their log-probs come out, checked against each other.
Deadlines, the errors told apart and the bound of an answer are those of `engine_http.py`.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from megatron_matpo.errors import EngineError, EngineRejected, EngineTimeout, EngineUnreachable
from megatron_matpo.rollout.engine_http import EngineHttp, shown
from megatron_matpo.rollout.generation import (
    BrokenGeneration,
    Generation,
    GenerationReader,
    SamplingParams,
    request_body,
)
from megatron_matpo.types import PauseMode

_POLL_S = 0.25
_HEALTH_LIMIT_S = 10.0
# A decode step or two.
_ABORTED_S = 0.05
_REQUEST_SETTING = "rollout.request_timeout_s"


class EngineClient(EngineHttp):
    """One server. Use it from one event loop; `close` it there."""

    def __init__(self, url: str, api_key: str = "", *, request_timeout_s: float = 600.0) -> None:
        """As `EngineHttp`; `request_timeout_s` bounds a generation."""
        super().__init__(url, api_key)
        self._request_timeout_s = request_timeout_s

    async def generate(self, input_ids: Sequence[int], params: SamplingParams) -> Generation:
        """Sample one continuation of `input_ids`.

        Raises:
            EngineUnreachable: no connection, or it broke.
            EngineTimeout: nothing complete inside `request_timeout_s`.
            EngineRejected: an HTTP error, or an answer that does not account for its tokens.
            BrokenGeneration: one of these, after a part of the answer (`stream_every`) had come.
        """
        body, reader = request_body(input_ids, params), GenerationReader()
        if params.stream_every:
            await self._read_parts(reader, body)
        else:
            limit = self._request_timeout_s
            answer = await self._ask_json("POST", "/generate", body, limit, _REQUEST_SETTING)
            self._add(reader, answer)
            if not reader.is_finished:
                raise EngineRejected(f"{self.url}/generate: did not end: {shown(answer)}")
        return reader.result()

    async def _read_parts(self, reader: GenerationReader, body: bytes) -> None:
        limit = self._request_timeout_s
        try:
            async for event in self._events("/generate", body, limit, _REQUEST_SETTING):
                self._add(reader, event)
            if not reader.is_finished:
                raise EngineUnreachable(f"{self.url}/generate: the answer ended in the middle")
        except EngineError as error:
            if (sampled := reader.result()).token_ids:
                raise BrokenGeneration(error, sampled) from error
            raise

    def _add(self, reader: GenerationReader, part: dict[str, Any]) -> None:
        try:
            reader.add(part)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise EngineRejected(
                f"{self.url}/generate: not a generation ({error!r}): {shown(part)}"
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
            raise EngineRejected(f"{self.url}/model_info: no weight_version in {shown(answer)}")
        return version

    async def pause(self, *, mode: PauseMode = "abort", deadline_s: float) -> None:
        """Stop sampling; new requests wait until `resume`, control requests are still served.

        `abort` ends running requests with what they have. SGLang's own mode of that name sleeps for
        a second if anything runs when it looks, and in a busy engine something always does. So they
        are told to end first and given a moment; what came in that moment is put back into the
        queue, which loses the few tokens that it has, and ended there. `retract` puts running
        requests back into the queue and forgets their KV cache; `in_place` freezes them with it. If
        requests were running, only `abort` allows the cache to be flushed: SGLang 0.5.20 ends its
        scheduler with an assertion when an update that flushes meets a request that waits.

        Raises:
            EngineError: as `generate`.
        """
        if mode == "abort":
            await self._abort_all(deadline_s)
            await asyncio.sleep(_ABORTED_S)
        sent = "retract" if mode == "abort" else mode
        await self._ask("POST", "/pause_generation", orjson.dumps({"mode": sent}), deadline_s)
        if mode == "abort":
            # SGLang 0.5.20 breaks an answer off if its last part meets one that is still to be sent
            # (KeyError in _coalesce_streaming_chunks). A question that only the scheduler can
            # answer comes back behind all that was sampled.
            await self._ask("GET", "/server_info", None, deadline_s)
            await self._abort_all(deadline_s)

    async def _abort_all(self, deadline_s: float) -> None:
        body = orjson.dumps({"rid": "", "abort_all": True})
        await self._ask("POST", "/abort_request", body, deadline_s)

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

    async def wait_idle(self, *, deadline_s: float) -> None:
        """Return when the scheduler has nothing to do; it forgets all cached prefixes then.

        Raises:
            EngineRejected: requests are still running or waiting.
            EngineError: as `generate`.
        """
        await self._ask("POST", f"/flush_cache?timeout={deadline_s:g}", b"{}", deadline_s)

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

    async def update_weights_from_disk(
        self, *, folder: str, weight_version: str, flush_cache: bool, deadline_s: float
    ) -> None:
        """Make the engine load the safetensors files of `folder`, and perhaps forget its cache.

        The folder's path is the engine's, so it must lie on a file system that both see.

        Raises:
            EngineError: as `generate`.
        """
        body = {
            "model_path": folder,
            "load_format": "safetensors",
            "weight_version": weight_version,
            "flush_cache": flush_cache,
        }
        await self._command("/update_weights_from_disk", body, deadline_s)

    async def update_weights_from_tensor(
        self,
        *,
        payloads: Sequence[bytes],
        weight_version: str | None,
        flush_cache: bool,
        deadline_s: float,
    ) -> None:
        """Make the engine load a flat bucket out of memory that it can open.

        Args:
            payloads: for each tensor-parallel rank of the engine what it opens and how it is laid
                out, as SGLang unpickles it (see `weight_sync.shared_buffers`).
            weight_version: as for `update_weights_from_distributed`.
            flush_cache: as for `update_weights_from_distributed`.
            deadline_s: for the whole loading (seconds).

        Raises:
            EngineError: as `generate`.
        """
        body = {
            "serialized_named_tensors": [base64.b64encode(part).decode() for part in payloads],
            "load_format": "flattened_bucket",
            "weight_version": weight_version,
            "flush_cache": flush_cache,
        }
        await self._command("/update_weights_from_tensor", body, deadline_s)

    async def release_memory(self, *, tags: Sequence[str], deadline_s: float) -> None:
        """Give the memory of `weights` or `kv_cache` back to the device; what was in it is lost.

        The engine must be paused and idle: SGLang ends its scheduler with an assertion otherwise.
        It gives back nothing without `--enable-memory-saver`, and answers all the same.

        Raises:
            EngineError: as `generate`.
        """
        body = orjson.dumps({"tags": list(tags)})
        await self._ask("POST", "/release_memory_occupation", body, deadline_s)

    async def resume_memory(self, *, tags: Sequence[str], deadline_s: float) -> None:
        """Take the memory of `tags` again, with undefined contents.

        Only what was released: SGLang ends its scheduler with a KeyError otherwise.

        Raises:
            EngineError: as `generate`.
        """
        body = orjson.dumps({"tags": list(tags)})
        await self._ask("POST", "/resume_memory_occupation", body, deadline_s)

    async def weight_checksums(self, *, deadline_s: float) -> list[dict[str, str]]:
        """What the engine's own checker says of the weights that it holds.

        Returns:
            Per tensor-parallel rank, 16 hexadecimal digits by the engine's name of the parameter.

        Raises:
            EngineError: as `generate`.
        """
        path = "/weights_checker"
        body = orjson.dumps({"action": "checksum"})
        answer = await self._ask_json("POST", path, body, deadline_s)
        try:
            ranks = sorted(answer["ranks"], key=lambda rank: rank["parallelism_info"]["tp_rank"])
            return [{str(k): str(v) for k, v in rank["checksums"].items()} for rank in ranks]
        except (KeyError, TypeError, AttributeError) as error:
            raise EngineRejected(
                f"{self.url}{path}: no checksums ({error!r}): {shown(answer)}"
            ) from error

    async def destroy_weights_update_group(self, *, group_name: str, deadline_s: float) -> None:
        """Make the engine leave the group.

        Raises:
            EngineError: as `generate`.
        """
        body = {"group_name": group_name}
        await self._command("/destroy_weights_update_group", body, deadline_s)
