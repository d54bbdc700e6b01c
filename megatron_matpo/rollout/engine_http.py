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
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson

from megatron_matpo.errors import EngineError, EngineRejected, EngineTimeout, EngineUnreachable

_KEEPALIVE_S = 2.0
_SHOWN_CHARS = 500
# A sampled token takes about 50 bytes; of a longer answer the rest is not even read.
_MAX_ANSWER_BYTES = 16 * 2**20
_EVENT = b"data:"
_DONE = b"[DONE]"


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
        """Close the connections; running requests end as unreachable. May be called twice.

        The next request opens new ones, so this is also how to give up all requests to a server
        that does not answer.
        """
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
        return self._json(path, await self._ask(method, path, body, deadline_s, setting))

    def _json(self, path: str, data: bytes) -> dict[str, Any]:
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
        """The body of an answer that is not an error."""
        session = self._open()
        started = time.monotonic()
        try:
            async with session.request(
                method, self.url + path, data=body, timeout=aiohttp.ClientTimeout(total=deadline_s)
            ) as response:
                data = b"".join([part async for part in self._parts(response, path)])
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._failure(path, error, started, deadline_s, setting) from error
        self._check_status(response, path, data)
        return data

    async def _events(
        self, path: str, body: bytes, deadline_s: float, setting: str
    ) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events of one answer, each a JSON object; ends with the server's `[DONE]`.

        A server that answers with one JSON object instead has sent one event.
        """
        session = self._open()
        started = time.monotonic()
        try:
            async with session.post(
                self.url + path, data=body, timeout=aiohttp.ClientTimeout(total=deadline_s)
            ) as response:
                rest = b""
                has_events = response.content_type == "text/event-stream"
                async for part in self._parts(response, path):
                    if has_events and response.status == 200:
                        *lines, rest = (rest + part).split(b"\n")
                        for line in lines:
                            if line.startswith(_EVENT) and line[len(_EVENT) :].strip() != _DONE:
                                yield self._json(path, line[len(_EVENT) :])
                    else:
                        rest += part
                self._check_status(response, path, rest)
                if not has_events:
                    yield self._json(path, rest)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._failure(path, error, started, deadline_s, setting) from error

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No limit on connections: the manager bounds its requests, and a health check must not
            # queue behind generations.
            # Idle connections are dropped before SGLang drops them (5 s): a request on one that is
            # just being closed would fail, and a generation is not sent twice.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
            self._session = aiohttp.ClientSession(
                connector=connector, headers=self._headers, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session

    def _failure(
        self, path: str, error: Exception, started: float, deadline_s: float, setting: str
    ) -> EngineError:
        elapsed_s = time.monotonic() - started
        if isinstance(error, TimeoutError):
            return EngineTimeout(
                f"{self.url}{path}: no complete answer after {elapsed_s:.1f} s "
                f"({setting}={deadline_s:g})"
            )
        return EngineUnreachable(
            f"{self.url}{path}: {error or type(error).__name__} "
            f"(after {elapsed_s:.1f} s of {setting}={deadline_s:g})"
        )

    def _check_status(self, response: aiohttp.ClientResponse, path: str, data: bytes) -> None:
        if response.status not in (200, 202):
            raise EngineRejected(f"{self.url}{path}: HTTP {response.status}: {shown(data)}")

    async def _parts(self, response: aiohttp.ClientResponse, path: str) -> AsyncIterator[bytes]:
        size = 0
        async for part in response.content.iter_any():
            yield part
            size += len(part)
            if size > _MAX_ANSWER_BYTES:
                response.close()  # else leaving the request would read on
                raise EngineRejected(
                    f"{self.url}{path}: the answer is longer than {_MAX_ANSWER_BYTES >> 20} MiB"
                )


def shown(answer: bytes | dict[str, Any]) -> str:
    """As much of an answer as fits an error message."""
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    text = data[:_SHOWN_CHARS].decode(errors="replace")
    return text if len(data) <= _SHOWN_CHARS else text + "..."
