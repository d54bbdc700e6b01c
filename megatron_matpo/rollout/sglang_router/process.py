"""The router's process, and which engines it sends requests to.

Source: SGLang's router 0.3.2, `POST /workers` (answers before the worker is used) and
`DELETE /workers/ID`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import orjson

from megatron_matpo.errors import EngineError, EngineTimeout, EngineUnreachable
from megatron_matpo.ports import free_ports
from megatron_matpo.rollout.engine_http import EngineHttp

SERVE = Path(__file__).with_name("serve.py")
_REQUEST_LIMIT_S = 10.0
_WORKER_LIMIT_S = 40.0
_POLL_S = 0.1
# The manager's other variables are keys of services, its token, and proxies.
_INHERITED = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR")


class RouterControl(EngineHttp):
    """The router's list of workers. Use it from one event loop."""

    def __init__(self, url: str, key: str) -> None:
        """Of the router at `url`; engines ask for the same `key`."""
        super().__init__(url, key)
        self._key = key

    async def workers(self) -> dict[str, tuple[str, bool]]:
        """(id, whether it gets requests) by URL.

        Raises:
            EngineError: the router does not answer, or not as it should.
        """
        answer = await self._ask_json("GET", "/workers", None, _REQUEST_LIMIT_S)
        items = cast(list[dict[str, Any]], answer.get("workers", []))
        return {str(i["url"]): (str(i["id"]), bool(i.get("is_healthy"))) for i in items}

    async def set_workers(self, urls: Sequence[str]) -> None:
        """Have requests go to these engines and no others; returns when it is so.

        Raises:
            EngineError: the router does not answer, or does not take an engine inside 40 s.
        """
        present = await self.workers()
        for url in present.keys() - set(urls):
            await self._ask("DELETE", f"/workers/{present[url][0]}", None, _REQUEST_LIMIT_S)
        for url in set(urls) - present.keys():
            body = orjson.dumps({"url": url, "api_key": self._key})
            await self._ask("POST", "/workers", body, _REQUEST_LIMIT_S)
        end = time.monotonic() + _WORKER_LIMIT_S
        while {url for url, (_, is_used) in (await self.workers()).items() if is_used} != set(urls):
            if time.monotonic() > end:
                raise EngineTimeout(f"{self.url}: does not send to {sorted(urls)} after 40 s")
            await asyncio.sleep(_POLL_S)


@asynccontextmanager
async def sglang_router(
    python: str, host: str, key: str, log: Path, *, start_timeout_s: float
) -> AsyncIterator[RouterControl]:
    """Start the router on a free port of `host`, without workers; it ends with the block.

    Raises:
        EngineUnreachable: it ended at once; `log` says why.
        EngineTimeout: it does not answer inside `start_timeout_s` (`run.start_timeout_s`).
    """
    ports = free_ports(host, 2)
    argv = [python, str(SERVE), host, *map(str, ports), str(os.getpid())]
    with log.open("ab") as sink:
        process = await asyncio.create_subprocess_exec(
            *argv,
            env={"MATPO_ENGINE_KEY": key}
            | {name: os.environ[name] for name in _INHERITED if name in os.environ},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
    control = RouterControl(f"http://{host}:{ports[0]}", key)
    try:
        await _wait_until_it_answers(control, process, log, start_timeout_s)
        yield control
    finally:
        await control.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _wait_until_it_answers(
    control: RouterControl, process: asyncio.subprocess.Process, log: Path, limit_s: float
) -> None:
    end = time.monotonic() + limit_s
    while True:
        try:
            await control.workers()
            return
        except EngineError as error:
            if process.returncode is not None:
                raise EngineUnreachable(
                    f"SGLang's router ended with code {process.returncode}; see {log}"
                ) from error
            if time.monotonic() > end:
                raise EngineTimeout(
                    f"SGLang's router: no answer inside run.start_timeout_s={limit_s:g}: {error}; "
                    f"see {log}"
                ) from error
        await asyncio.sleep(_POLL_S)
