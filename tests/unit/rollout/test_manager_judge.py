"""Proves a judged step of the real manager process: verdicts over HTTP, kept on disk, key unseen.

Engine and judge are stand-ins; manager, tool servers, data set and cache are real.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_matpo import wire
from megatron_matpo.config.reward import JudgeConfig, RewardConfig
from megatron_matpo.config.tools import CacheConfig
from megatron_matpo.ports import free_ports
from tests.helpers.fake_judge import KEY, FakeJudge
from tests.unit.rollout import test_manager_process as process


@contextmanager
def judge_in_a_thread(reply: str) -> Iterator[FakeJudge]:
    """The tests' own loop is not running while the manager is."""
    fake, ready, loop = FakeJudge(reply), threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with fake:
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


@pytest.mark.smoke
def test_a_judged_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(process.ENV, "TEST_JUDGE_KEY", KEY)
    with judge_in_a_thread("A: CORRECT") as fake:
        config = process._config(tmp_path)
        judge = JudgeConfig(base_url=fake.base_url, api_key_env="TEST_JUDGE_KEY")
        config = replace(
            config,
            reward=RewardConfig(grader="judge", judge=judge),
            tools=replace(config.tools, cache=CacheConfig(mode="read_write")),
        )
        run_dir, plan = process._write_run(config, free_ports("127.0.0.1", 1)[0])
        status, body, log, code = process._collect((run_dir, plan), version=0, asked=0)
    assert (status, code) == (200, 0), log
    batch = wire.decode(body)
    rewards = [episode.reward for group in batch.groups for episode in group.episodes]
    assert [reward.verdict for reward in rewards if reward] == ["correct"] * 4
    # All four give the same answer to the same question: it is judged once.
    assert batch.metrics["judge/calls"] == len(fake.prompts) == 1
    assert batch.metrics["judge/cache_hits"] == 3
    query = "SELECT reply FROM replies WHERE service = 'judge'"  # the search is kept as well
    rows = sqlite3.connect(run_dir / "cache.sqlite").execute(query).fetchall()
    assert rows == [("correct",)]
    for path in run_dir.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in log and KEY.encode() not in body
