"""Proves the reply cache on real SQLite files: keys, coalescing, cancellation, replay."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from megatron_matpo import cache as module
from megatron_matpo.cache import ReplyCache
from megatron_matpo.config.tools import CacheConfig
from megatron_matpo.errors import CacheMissError, ConfigError, ToolError

READ_WRITE = CacheConfig(mode="read_write")
REPLAY = CacheConfig(mode="replay")


class Service:
    """Counts its calls; `gate` holds them back, `keep` says whether replies may be kept."""

    def __init__(self, reply: str = "reply", keep: bool = True) -> None:
        self.num_calls = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.reply = reply
        self.keep = keep
        self.error: Exception | None = None

    async def __call__(self) -> tuple[str, bool]:
        self.num_calls += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.reply, self.keep


def with_cache(
    path: Path, body: Callable[[ReplyCache], Awaitable[None]], config: CacheConfig = READ_WRITE
) -> None:
    async def run() -> None:
        cache = ReplyCache(config, path)
        try:
            await body(cache)
        finally:
            cache.close()
            cache.close()

    asyncio.run(run())


def test_a_reply_is_kept_for_later_runs_whatever_the_order_of_the_arguments(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cache.sqlite"
    service = Service("Grüße \ud83d")

    async def first(cache: ReplyCache) -> None:
        # Half of a surrogate pair cannot be stored: it is replaced for all readers alike.
        assert await cache.fetch("search", {"q": "a", "num": 1}, service) == "Grüße ?"
        assert (cache.hits["search"], cache.misses["search"]) == (0, 1)

    async def second(cache: ReplyCache) -> None:
        assert await cache.fetch("search", {"num": 1, "q": "a"}, service) == "Grüße ?"
        assert (cache.hits["search"], cache.misses["search"]) == (1, 0)
        await cache.fetch("search", {"num": 1.5, "q": "a"}, service)
        await cache.fetch("scrape", {"num": 1, "q": "a"}, service)
        await cache.fetch("scrape", {"q": "\udc00"}, service)
        assert cache.misses == {"search": 1, "scrape": 2}

    with_cache(path, first)
    with_cache(path, second)
    assert service.num_calls == 4


def test_replies_that_may_not_be_kept_are_asked_for_again(tmp_path: Path) -> None:
    async def body(cache: ReplyCache) -> None:
        service = Service("no such page", keep=False)
        for _ in range(2):
            assert await cache.fetch("scrape", {"url": "u"}, service) == "no such page"
        assert service.num_calls == 2

    with_cache(tmp_path / "c.sqlite", body)


def test_equal_requests_in_flight_ask_once(tmp_path: Path) -> None:
    async def body(cache: ReplyCache) -> None:
        service = Service()
        service.gate.clear()
        tasks = [asyncio.create_task(cache.fetch("s", {"q": 1}, service)) for _ in range(5)]
        while not service.num_calls:
            await asyncio.sleep(0.001)
        service.gate.set()
        assert await asyncio.gather(*tasks) == ["reply"] * 5
        assert service.num_calls == 1
        assert (cache.hits["s"], cache.misses["s"]) == (4, 1)

    with_cache(tmp_path / "c.sqlite", body)


def test_a_cancelled_leader_hands_over_and_a_cancelled_waiter_disturbs_nobody(
    tmp_path: Path,
) -> None:
    async def body(cache: ReplyCache) -> None:
        service = Service()
        service.gate.clear()
        tasks = [asyncio.create_task(cache.fetch("s", {"q": 1}, service)) for _ in range(4)]
        while not service.num_calls:
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        tasks[3].cancel()
        while service.num_calls < 2:
            await asyncio.sleep(0.001)
        service.gate.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert outcomes[1:3] == ["reply", "reply"]
        assert isinstance(outcomes[0], asyncio.CancelledError)
        assert isinstance(outcomes[3], asyncio.CancelledError)
        assert service.num_calls == 2

    with_cache(tmp_path / "c.sqlite", body)


@pytest.mark.parametrize("keep", [True, False])
def test_a_failed_leader_fails_alone(tmp_path: Path, keep: bool) -> None:
    async def body(cache: ReplyCache) -> None:
        leader, waiter = Service(keep=keep), Service("own")
        leader.gate.clear()
        leader.error = ToolError("down") if keep else None
        first = asyncio.create_task(cache.fetch("s", {"q": 1}, leader))
        while not leader.num_calls:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(cache.fetch("s", {"q": 1}, waiter)) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert waiter.num_calls == 0
        leader.gate.set()
        outcomes = await asyncio.gather(first, *others, return_exceptions=True)
        assert outcomes[1:] == ["own", "own"]
        assert isinstance(outcomes[0], ToolError) if keep else outcomes[0] == "reply"

    with_cache(tmp_path / "c.sqlite", body)


def test_old_entries_are_asked_for_again_but_not_in_replay(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    service = Service()

    async def fetch(cache: ReplyCache) -> None:
        await cache.fetch("s", {"q": 1}, service)

    with_cache(path, fetch)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE replies SET created = created - 3 * 86400")
    with_cache(path, fetch, CacheConfig(mode="replay", max_age_days=2))
    with_cache(path, fetch, CacheConfig(mode="read_write", max_age_days=4))
    assert service.num_calls == 1
    with_cache(path, fetch, CacheConfig(mode="read_write", max_age_days=2))
    with_cache(path, fetch, CacheConfig(mode="read_write", max_age_days=2))
    assert service.num_calls == 2


def test_replay_never_calls(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    service = Service()

    async def record(cache: ReplyCache) -> None:
        await cache.fetch("s", {"q": 1}, service)

    async def replay(cache: ReplyCache) -> None:
        assert await cache.fetch("s", {"q": 1}, service) == "reply"
        requests = [cache.fetch("search", {"q": 2}, service) for _ in range(3)]
        for outcome in await asyncio.gather(*requests, return_exceptions=True):
            assert isinstance(outcome, CacheMissError)
            assert isinstance(outcome, ToolError)
            for part in ("'search'", '{"q": 2}', str(path), "read_write"):
                assert part in str(outcome)
        assert (cache.hits["s"], cache.misses["search"]) == (1, 3)

    with_cache(path, record)
    before = path.read_bytes()
    with_cache(path, replay, REPLAY)
    assert service.num_calls == 1
    assert path.read_bytes() == before


def test_off_opens_no_file_and_shares_nothing(tmp_path: Path) -> None:
    service = Service()

    async def body(cache: ReplyCache) -> None:
        await asyncio.gather(*(cache.fetch("s", {"q": 1}, service) for _ in range(3)))
        assert not cache.hits and not cache.misses

    with_cache(tmp_path / "c.sqlite", body, CacheConfig())
    assert service.num_calls == 3
    assert not list(tmp_path.iterdir())


def test_two_caches_share_a_file(tmp_path: Path) -> None:
    async def body(one: ReplyCache) -> None:
        two = ReplyCache(READ_WRITE, tmp_path / "c.sqlite")
        service = Service()
        await asyncio.gather(*(one.fetch("s", {"q": n}, service) for n in range(20)))
        await asyncio.gather(*(two.fetch("s", {"q": n}, service) for n in range(20)))
        assert service.num_calls == 20
        two.close()

    with_cache(tmp_path / "c.sqlite", body)


@pytest.mark.parametrize("config", [READ_WRITE, REPLAY])
def test_bad_files_are_named_at_start(
    tmp_path: Path, config: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.05)
    garbage, other, locked = (tmp_path / name for name in ("garbage", "other", "locked"))
    garbage.write_bytes(b"this is not a database" * 100)
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE notes (text)")
    ReplyCache(READ_WRITE, locked).close()
    holder = sqlite3.connect(locked, isolation_level=None)
    holder.execute("PRAGMA journal_mode = DELETE")
    holder.execute("BEGIN EXCLUSIVE")
    expected = {garbage: "damaged", other: "not a reply cache", locked: "another process held it"}
    for path, text in expected.items():
        with pytest.raises(ConfigError, match=text) as caught:
            ReplyCache(config, path)
        assert str(path) in str(caught.value)
    holder.close()
    with pytest.raises(ConfigError, match="no such file"):
        ReplyCache(REPLAY, tmp_path / "missing")
    with pytest.raises(ConfigError, match="folder that can be written"):
        ReplyCache(READ_WRITE, garbage / "c.sqlite")


def test_a_file_that_breaks_later_costs_no_reply_but_ends_a_replay(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    service = Service()

    async def body(cache: ReplyCache) -> None:
        with sqlite3.connect(path) as database:
            database.execute("DROP TABLE replies")
        assert await cache.fetch("s", {"q": 1}, service) == "reply"

    async def replay(cache: ReplyCache) -> None:
        with sqlite3.connect(path) as database:
            database.execute("DROP TABLE replies")
        with pytest.raises(ToolError, match="cannot be read"):
            await cache.fetch("s", {"q": 1}, service)

    with_cache(path, body)
    with_cache(tmp_path / "d.sqlite", lambda cache: asyncio.sleep(0))
    path = tmp_path / "d.sqlite"
    with_cache(path, replay, REPLAY)
    assert service.num_calls == 1
