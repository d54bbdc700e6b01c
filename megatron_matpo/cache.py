"""Replies of paid services (search, scrape, judge) on disk: one SQLite file that runs may share.

An entry is found by the SHA-256 of its service's name and its request as canonical JSON. Requests
hold arguments only, never headers or keys, so that the file may be handed on. WAL journals need a
local disk, not a network file system.

Waiting for the database happens in one thread of the cache's own, never in the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_matpo.config.tools import CacheConfig
from megatron_matpo.errors import CacheMissError, ConfigError, ToolError

LOCK_TIMEOUT_S = 10.0
"""Longest wait for another process's write, at start and later."""
_APPLICATION_ID = 0x4D43_4831  # "MCH1": a file of ours, in this layout
_SHOWN_REQUEST_CHARS = 300
_DAY_S = 86400.0
_CREATE = """
CREATE TABLE IF NOT EXISTS replies (
    key BLOB PRIMARY KEY, service TEXT NOT NULL, request TEXT NOT NULL,
    reply TEXT NOT NULL, created REAL NOT NULL
) WITHOUT ROWID
"""

_log = logging.getLogger(__name__)

Call = Callable[[], Awaitable[tuple[str, bool]]]
"""Asks the service: (reply, whether it may be kept and shared)."""


class ReplyCache:
    """Replies by request; equal requests of this process that overlap ask the service once."""

    def __init__(self, config: CacheConfig, path: Path) -> None:
        """Open or create the file at `path`; `config.mode` `off` opens nothing.

        Raises:
            ConfigError: the file is damaged, locked, not a cache, or (`replay`) missing.
        """
        self.hits: Counter[str] = Counter()
        """By service: replies that came from the file, or from an equal request in flight."""
        self.misses: Counter[str] = Counter()
        """By service: requests that the file had no reply for."""
        self._mode = config.mode
        self._max_age_s = config.max_age_days * _DAY_S if config.mode == "read_write" else 0.0
        self._path = path
        self._flights: dict[bytes, asyncio.Future[str | None]] = {}
        self._database: sqlite3.Connection | None = None
        if config.mode != "off":
            self._database = _open(path, is_replay=config.mode == "replay")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reply-cache")

    async def fetch(self, service: str, request: Mapping[str, Any], call: Call) -> str:
        """The reply to `request`: the file's, an equal request's in flight, or that of `call`.

        A request that waited for an equal one which failed, or whose reply may not be shared, makes
        a call of its own, so that a failure is never anybody else's.

        Raises:
            CacheMissError: `replay` and the file has no reply.
            Exception: whatever `call` raises.
        """
        if self._mode == "off":
            return (await call())[0]
        text = json.dumps(request, sort_keys=True)
        key = hashlib.sha256(json.dumps([service, text]).encode()).digest()
        while (flight := self._flights.get(key)) is not None:
            await asyncio.wait([flight])
            if flight.cancelled():
                continue  # its leader was cancelled: the first to wake leads the others
            reply = flight.result()
            if reply is None:
                return await self._ask(None, service, key, text, call)
            self.hits[service] += 1
            return reply
        flight = self._flights[key] = asyncio.get_running_loop().create_future()
        try:
            return await self._lead(flight, service, key, text, call)
        except asyncio.CancelledError:
            flight.cancel()
            raise
        finally:
            if not flight.done():
                flight.set_result(None)
            del self._flights[key]

    def close(self) -> None:
        """Close the file; requests in flight must have ended. A second call does nothing."""
        database, self._database = self._database, None
        if database is not None:
            self._thread.submit(database.close)
        self._thread.shutdown()

    async def _lead(
        self, flight: asyncio.Future[str | None], service: str, key: bytes, text: str, call: Call
    ) -> str:
        """Look the request up or ask; whoever waits for `flight` goes on with a shared reply."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, self._look_up, key)
        if found is None:
            return await self._ask(flight, service, key, text, call)
        self.hits[service] += 1
        flight.set_result(found)
        return found

    async def _ask(
        self,
        flight: asyncio.Future[str | None] | None,
        service: str,
        key: bytes,
        text: str,
        call: Call,
    ) -> str:
        self.misses[service] += 1
        if self._mode == "replay":
            raise CacheMissError(
                f"tools.cache.mode=replay: {self._path} has no reply of {service!r} to "
                f"{text[:_SHOWN_REQUEST_CHARS]}; record it with tools.cache.mode=read_write"
            )
        reply, may_be_kept = await call()
        if not may_be_kept:
            return reply
        # Lone halves of surrogate pairs cannot be stored; all readers get the same text.
        reply = reply.encode("utf-8", "replace").decode()
        if flight is not None:
            flight.set_result(reply)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._keep, key, service, text, reply)
        return reply

    def _look_up(self, key: bytes) -> str | None:
        if self._database is None:
            return None
        try:
            row = self._database.execute(
                "SELECT reply, created FROM replies WHERE key = ?", (key,)
            ).fetchone()
        except sqlite3.Error as error:
            if self._mode == "replay":
                raise ToolError(f"tools.cache: {self._path} cannot be read: {error}") from error
            _log.warning("tools.cache: %s cannot be read: %s", self._path, error)
            return None
        if row is None or (self._max_age_s and time.time() - row[1] > self._max_age_s):
            return None
        return str(row[0])

    def _keep(self, key: bytes, service: str, text: str, reply: str) -> None:
        if self._database is None:
            return
        try:
            with self._database:
                self._database.execute(
                    "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?)",
                    (key, service, text, reply, time.time()),
                )
        except sqlite3.Error as error:  # a full disk must not cost the reply itself
            _log.warning("tools.cache: %s: a reply was not kept: %s", self._path, error)


def _open(path: Path, *, is_replay: bool) -> sqlite3.Connection:
    if is_replay and not path.is_file():
        raise ConfigError(
            f"tools.cache.path={path}: no such file, and tools.cache.mode=replay needs the replies "
            "of an earlier run; record them with tools.cache.mode=read_write"
        )
    database: sqlite3.Connection | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, check_same_thread=False)
        (identity,) = database.execute("PRAGMA application_id").fetchone()
        (num_tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if identity != _APPLICATION_ID and (num_tables or is_replay):
            raise ConfigError(f"tools.cache.path={path}: is a database, but not a reply cache")
        if is_replay:
            database.execute("PRAGMA query_only = 1")
            database.execute("SELECT reply, created FROM replies LIMIT 1").fetchone()
            return database
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose replies, no more
        database.execute(_CREATE)
        database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        database.execute("BEGIN IMMEDIATE")  # shows a lock held by another process now
        database.rollback()
    except (sqlite3.Error, OSError, ConfigError) as error:
        if database is not None:
            database.close()
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"tools.cache.path={path}: cannot be used as the reply cache: {error}; {_advice(error)}"
        ) from error
    return database


def _advice(error: Exception) -> str:
    if "locked" in str(error):
        return f"another process held it for {LOCK_TIMEOUT_S:g} s; end that one, or name another"
    if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
        return "it is damaged or no SQLite file; remove it, or name another"
    return "name a file in a folder that can be written"
