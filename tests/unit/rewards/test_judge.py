"""Proves what the judge's client makes of an endpoint, good or broken, over real HTTP.

The endpoint is a fake (`tests/helpers/fake_judge.py`): the real ones are paid services.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_matpo.cache import ReplyCache
from megatron_matpo.config.reward import JudgeConfig
from megatron_matpo.config.tools import CacheConfig
from megatron_matpo.errors import JudgeError, JudgeRefusedError
from megatron_matpo.rewards.judge import Judge, JudgeCounts
from megatron_matpo.rewards.verdict import Verdict
from tests.helpers.fake_judge import KEY, Behaviour, FakeJudge, Script

CONFIG = JudgeConfig(
    model="grader-1",
    api_key_env="TEST_JUDGE_KEY",
    timeout_s=20.0,
    max_attempts=3,
    backoff_s=0.01,
    deadline_s=60.0,
)
# Faults that end by the deadline of the request; the others must not meet it.
SLOW = {"hang": {"timeout_s": 0.3}, "drip": {"timeout_s": 0.3}}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)


def run(
    script: Script | list[Behaviour] | Behaviour,
    use: Callable[[Judge, JudgeCounts], Awaitable[Any]],
    cache: Callable[[], ReplyCache] | None = None,
    **settings: Any,
) -> tuple[Any, FakeJudge, JudgeCounts]:
    """(what `use` returns, the fake, the counts); nothing may be left behind."""

    async def main() -> tuple[Any, FakeJudge, JudgeCounts]:
        counts = JudgeCounts()
        kept = cache() if cache else None
        async with FakeJudge(script) as fake:
            config = replace(CONFIG, base_url=fake.base_url, **settings)
            async with Judge(config, kept) as judge:
                result = await use(judge, counts)
            for _ in range(100):
                if not fake.num_open:
                    break
                await asyncio.sleep(0.01)
            assert fake.num_open == 0, "the server still works on a request that nobody wants"
        if kept:
            kept.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert others == set(), "tasks were left behind"
        return result, fake, counts

    return asyncio.run(main())


def ask(judge: Judge, counts: JudgeCounts) -> Awaitable[Verdict]:
    return judge.verdict("Who wrote it?", "Ada", "ada", counts)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("A", "correct"), ("B", "incorrect"), ("**C**", "not_attempted"), ("CORRECT", "correct")],
)
def test_a_verdict(reply: str, verdict: str) -> None:
    result, fake, counts = run(reply, ask)
    assert result == verdict
    assert fake.authorizations == [f"Bearer {KEY}"]
    assert fake.bodies[0]["model"] == "grader-1" and fake.bodies[0]["max_tokens"] == 16
    assert "Predicted answer: ada\n" in fake.prompts[0]
    assert (counts.num_requests, counts.num_answered, counts.num_failures) == (1, 1, 0)
    assert counts.metrics()["judge/latency_s_mean"] > 0


def test_an_endpoint_without_a_key_gets_none() -> None:
    _, fake, _ = run("A", ask, api_key_env="", max_tokens_field="max_completion_tokens")
    assert fake.authorizations == [""]
    assert "max_tokens" not in fake.bodies[0] and fake.bodies[0]["max_completion_tokens"] == 16


@pytest.mark.parametrize(
    "fault",
    [
        *("hang", "drip", "huge", "not_json", "no_choice", "no_text", "too_long", "crash"),
        *("http_429", "http_429_later", "http_500", "http_503", "A or B"),
    ],
)
def test_one_fault_is_overcome(fault: str) -> None:
    result, fake, counts = run([fault, "B"], ask, **SLOW.get(fault, {}))
    assert result is Verdict.INCORRECT
    assert len(fake.prompts) == counts.num_requests == 2 and counts.num_failures == 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hang", r"no reply after 0\.3 s \(reward\.judge\.timeout_s\)"),
        ("drip", r"no reply after 0\.3 s"),
        ("huge", "more than 1048576 bytes"),
        ("not_json", "not a chat completion: '<html>"),
        ("no_choice", "not a chat completion"),
        ("no_text", r"without text \(finish_reason length\); raise reward\.judge\.max_tokens"),
        ("too_long", "not a verdict: 'AAAA"),
        ("crash", "ServerDisconnected"),
        ("http_429", "HTTP 429: slow down"),
        ("http_500", "HTTP 500: oops"),
        ("A or B", "not a verdict: 'A or B'"),
    ],
)
def test_a_lasting_fault_is_an_error_never_a_verdict(fault: str, reason: str) -> None:
    async def use(judge: Judge, counts: JudgeCounts) -> None:
        with pytest.raises(JudgeError, match=reason) as caught:
            await ask(judge, counts)
        assert not isinstance(caught.value, JudgeRefusedError)
        assert "reward.judge.max_attempts" in str(caught.value)

    _, fake, counts = run(fault, use, **SLOW.get(fault, {}))
    assert len(fake.prompts) == 3 and counts.num_failures == 1


def test_a_reply_outside_the_grammar_is_asked_again_in_other_words() -> None:
    _, fake, _ = run(["Hm.", "Well.", "A"], ask)
    first, second, third = fake.prompts
    assert second != first and second.startswith(first) and third == second


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("refuse_key", r"refuses the key \(HTTP 401\); check .* TEST_JUDGE_KEY"),
        ("no_model", r"reward\.judge\.model=grader-1: HTTP 404: The model does not exist"),
        ("no_credit", "insufficient_quota"),
        ("http_302", "HTTP 302: elsewhere"),
    ],
)
def test_what_no_attempt_can_change_is_said_at_once(fault: str, reason: str) -> None:
    async def use(judge: Judge, counts: JudgeCounts) -> None:
        with pytest.raises(JudgeRefusedError, match=reason) as caught:
            await ask(judge, counts)
        assert KEY not in repr(caught.value)

    _, fake, _ = run(fault, use)
    assert len(fake.prompts) == 1


def test_a_request_that_is_refused_for_itself_is_not_repeated() -> None:
    async def use(judge: Judge, counts: JudgeCounts) -> None:
        with pytest.raises(JudgeError, match="HTTP 400: the prompt is too long") as caught:
            await ask(judge, counts)
        assert not isinstance(caught.value, JudgeRefusedError)

    assert len(run("http_400", use)[1].prompts) == 1


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_JUDGE_KEY")

    async def use(judge: Judge, counts: JudgeCounts) -> None:
        with pytest.raises(JudgeRefusedError, match=r"api_key_env=TEST_JUDGE_KEY: .* not set"):
            await ask(judge, counts)

    assert run("A", use)[1].prompts == []


def test_retry_after_holds_all_requests_back() -> None:
    asked_at: list[float] = []

    def script(index: int, prompt: str) -> Behaviour:
        asked_at.append(time.monotonic())
        return "http_429_later" if index == 0 else "A"

    async def use(judge: Judge, counts: JudgeCounts) -> None:
        first = asyncio.ensure_future(ask(judge, counts))
        while not asked_at:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)  # the refusal has arrived
        await asyncio.gather(first, judge.verdict("Other?", "x", "y", counts))

    run(script, use)
    assert min(asked_at[1:]) - asked_at[0] >= 0.2


def test_concurrency_is_bounded_and_waiting_counts_against_the_deadline() -> None:
    async def use(judge: Judge, counts: JudgeCounts) -> list[object]:
        jobs = [judge.verdict(f"Question {i}?", "x", "y", counts) for i in range(6)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    results, fake, counts = run("hang", use, max_concurrency=2, timeout_s=0.4, deadline_s=0.5)
    assert fake.max_open == 2
    reasons = [str(result) for result in results]
    assert all(isinstance(result, JudgeError) for result in results)
    assert all("no verdict after 0.5 s (reward.judge.deadline_s)" in text for text in reasons)
    assert any("it waited for its turn" in text for text in reasons)
    assert counts.num_failures == 6


def test_cancelling_ends_the_request() -> None:
    async def use(judge: Judge, counts: JudgeCounts) -> None:
        task = asyncio.ensure_future(ask(judge, counts))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run("hang", use, timeout_s=30.0)  # and `run` sees that nothing is left


def test_the_key_is_in_no_error_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []

    async def use(judge: Judge, counts: JudgeCounts) -> None:
        for _ in range(2):
            try:
                await ask(judge, counts)
            except JudgeError as error:
                cause: BaseException | None = error
                while cause is not None:
                    texts.append(repr(cause))
                    cause = cause.__cause__ or cause.__context__

    run(lambda index, _: "refuse_key" if index == 0 else f"leak {KEY}", use)
    assert texts and "[key]" in "".join(texts)
    assert KEY not in "".join(texts) + caplog.text


def test_the_environment_s_proxy_is_used_and_its_netrc_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine judge.invalid login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("HTTP_PROXY", "NO_PROXY"):  # the lower-case ones win
        monkeypatch.delenv(name, raising=False)

    async def main() -> None:
        config = replace(CONFIG, base_url="http://judge.invalid/v1", max_attempts=1)
        async with FakeJudge("A") as fake:  # stands in for the proxy
            monkeypatch.setenv("http_proxy", fake.base_url.removesuffix("/v1"))
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            async with Judge(config) as judge:
                assert await ask(judge, JudgeCounts()) is Verdict.CORRECT
            assert fake.authorizations == [f"Bearer {KEY}"]
            monkeypatch.setenv("no_proxy", "judge.invalid")
            async with Judge(config) as judge:
                with pytest.raises(JudgeError, match="ClientConnector"):
                    await ask(judge, JudgeCounts())

    asyncio.run(main())


def test_lone_surrogates_and_hostile_answers_can_be_asked() -> None:
    async def use(judge: Judge, counts: JudgeCounts) -> Verdict:
        return await judge.verdict("\ud800?", "x\udfff", "\x00\ud800 {answer}", counts)

    assert run("B", use)[0] is Verdict.INCORRECT


def test_verdicts_are_kept_and_failures_are_not(tmp_path: Path) -> None:
    def cache(mode: str = "read_write") -> ReplyCache:
        return ReplyCache(CacheConfig(mode=mode), tmp_path / "cache.sqlite")

    async def fail(judge: Judge, counts: JudgeCounts) -> None:
        with pytest.raises(JudgeError):
            await ask(judge, counts)

    async def twice(judge: Judge, counts: JudgeCounts) -> list[Verdict]:
        others = [judge.verdict("Who wrote it?", "Ada", "Bob", counts) for _ in range(3)]
        return [await ask(judge, counts), await ask(judge, counts), *await asyncio.gather(*others)]

    run("http_500", fail, cache)
    verdicts, fake, counts = run(lambda _, prompt: "B" if "Bob" in prompt else "A", twice, cache)
    assert verdicts == ["correct", "correct", "incorrect", "incorrect", "incorrect"]
    assert len(fake.prompts) == counts.num_requests == 2 and counts.num_cache_hits == 3
    # Another run with the same file asks nobody; offline, what is missing is an error.
    _, fake, _ = run("C", twice, cache)
    assert fake.prompts == []

    async def offline(judge: Judge, counts: JudgeCounts) -> None:
        assert await ask(judge, counts) is Verdict.CORRECT
        with pytest.raises(JudgeError, match=r"tools\.cache\.mode=replay"):
            await judge.verdict("Unheard of?", "Ada", "ada", counts)

    _, fake, counts = run("A", offline, lambda: cache("replay"), api_key_env="NOT_SET_ANYWHERE")
    assert fake.prompts == [] and counts.num_failures == 1
    # Another model's verdicts are not this one's.
    _, fake, _ = run("A", ask, cache, model="grader-2")
    assert len(fake.prompts) == 1
    assert KEY.encode() not in (tmp_path / "cache.sqlite").read_bytes()


def test_no_file_handle_is_left() -> None:
    async def use(judge: Judge, counts: JudgeCounts) -> None:
        await asyncio.gather(ask(judge, counts), return_exceptions=True)

    process = psutil.Process()
    run("hang", use, **SLOW["hang"])
    before = process.num_fds()
    for fault in ("hang", "drip", "huge", "crash", "http_500"):
        run(fault, use, **SLOW.get(fault, {}))
    assert process.num_fds() <= before
