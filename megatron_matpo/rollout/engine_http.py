"""One HTTP connection pool to one SGLang server: deadlines, errors told apart, bounded answers.

Invariants:

* every request has a deadline (seconds), and the error of a missed one names it;
* three failures are told apart: no connection (`EngineUnreachable`), no answer in time
  (`EngineTimeout`), an answer that is an error or not the protocol (`EngineRejected`);
* nothing is retried here: whoever knows whether a repetition is harmless repeats;
* no answer is read past `_MAX_ANSWER_BYTES`, whatever the server sends.

A request that is cancelled or runs into its deadline closes its connection, and SGLang aborts it.
"""

from __future__ import annotations

import json
import time
from typing import Any

import aiohttp
import orjson

from megatron_matpo.errors import EngineRejected, EngineTimeout, EngineUnreachable

_KEEPALIVE_S = 2.0
_SHOWN_CHARS = 500
# A sampled token takes about 50 bytes; of a longer answer the rest is not even read.
_MAX_ANSWER_BYTES = 16 * 2**20


class EngineHttp:
    """Requests to one server. Use it from one event loop; `close` it there."""

    def __init__(self, url: str, api_key: str = "") -> None:
        """Connect lazily to `url` (no trailing slash)."""
        self.url = url
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections; running requests are aborted. May be called twice."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _command(self, path: str, body: dict[str, Any], deadline_s: float) -> None:
        """A verb whose answer says whether it succeeded."""
        answer = await self._ask_json("POST", path, orjson.dumps(body), deadline_s)
        if answer.get("success") is not True:
            raise EngineRejected(f"{self.url}{path}: {shown(answer)}")

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
            raise EngineRejected(f"{self.url}{path}: not JSON: {shown(data)}") from error
        if not isinstance(answer, dict):
            raise EngineRejected(f"{self.url}{path}: not a JSON object: {shown(data)}")
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
            raise EngineRejected(f"{self.url}{path}: HTTP {response.status}: {shown(data)}")
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


def shown(answer: bytes | dict[str, Any]) -> str:
    """As much of an answer as fits an error message."""
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    text = data[:_SHOWN_CHARS].decode(errors="replace")
    return text if len(data) <= _SHOWN_CHARS else text + "..."
