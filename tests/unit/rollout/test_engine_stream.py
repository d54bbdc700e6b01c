"""Proves that an answer that comes in parts is put together, and that no part is lost.

That a real server speaks the same is proved by `tests/smoke/test_engine.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from megatron_matpo.errors import EngineRejected, EngineUnreachable
from megatron_matpo.rollout.generation import BrokenGeneration, SamplingParams
from megatron_matpo.types import VersionSpan
from tests.helpers.fake_sglang import fake_server

STREAMED = SamplingParams(max_new_tokens=9, stream_every=2)


def part(ids: list[int], finish: str, before: int, **meta: Any) -> bytes:
    """A server-sent event of SGLang 0.5.20 with --incremental-streaming-output."""
    total = before + len(ids)
    # Only the last part tells the version of every token.
    spans = {"weight_versions": [{"version": "3", "start": 0, "end": total}]} if finish else {}
    body = {
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": finish, "status_code": None} if finish else None,
            "output_token_logprobs": [[-0.5 * token, token, None] for token in ids],
            "completion_tokens": total,
            "weight_version": "3",
            **spans,
            **meta,
        },
    }
    return b"data: " + json.dumps(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def streams(*events: bytes, dies: bool = False) -> Callable[[web.Request], Awaitable[Any]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        whole = b"".join(events)
        for start in range(0, len(whole), 100):  # events do not come one per packet
            await response.write(whole[start : start + 100])
            await asyncio.sleep(0)
        if dies:
            assert request.transport is not None
            await asyncio.sleep(0.05)
            request.transport.abort()
        return response

    return answer


@pytest.mark.parametrize(
    "events",
    [
        [part([7, 8], "", 0), part([9, 4], "", 2), part([2], "stop", 4), DONE],
        [part([7, 8, 9, 4, 2], "stop", 0), DONE],
        # Without the flag a part holds all so far.
        [part([7, 8], "", 0), part([7, 8, 9, 4, 2], "stop", 0), DONE],
    ],
)
def test_an_answer_in_parts_is_put_together(events: list[bytes]) -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = streams(*events)
            sampled = await client.generate([5], STREAMED)
            assert list(sampled.token_ids) == [7, 8, 9, 4, 2]
            assert list(sampled.logprobs) == [-3.5, -4.0, -4.5, -2.0, -1.0]
            assert sampled.versions == (VersionSpan(3, 5),) and sampled.finish_reason == "stop"
            body = fake.asked[0][2]
            assert body["stream"] is True and body["sampling_params"]["stream_interval"] == 2

    asyncio.run(scenario())


def test_what_an_engine_had_sampled_when_it_died_is_kept() -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = streams(part([7, 8], "", 0), part([9], "", 2), dies=True)
            with pytest.raises(BrokenGeneration, match=r"after 3 tokens") as caught:
                await client.generate([5], STREAMED)
            sampled = caught.value.sampled
            assert (list(sampled.token_ids), sampled.finish_reason) == ([7, 8, 9], "abort")
            assert isinstance(caught.value.__cause__, EngineUnreachable)
            fake.answer = streams(part([7, 8], "", 0))  # ends properly, but too early
            with pytest.raises(BrokenGeneration, match="ended in the middle"):
                await client.generate([5], STREAMED)
            fake.answer = streams(dies=True)
            with pytest.raises(EngineUnreachable):
                await client.generate([5], STREAMED)

    asyncio.run(scenario())


def test_closing_the_client_gives_up_its_requests_with_what_they_have() -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):

            async def stalls(request: web.Request) -> web.StreamResponse:
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                response.enable_chunked_encoding()
                await response.prepare(request)
                await response.write(part([7, 8], "", 0))
                return await fake.hangs(request)

            fake.answer = stalls
            waiting = asyncio.ensure_future(client.generate([5], STREAMED))
            await asyncio.sleep(0.2)
            await client.close()
            with pytest.raises(BrokenGeneration) as caught:
                await waiting
            assert list(caught.value.sampled.token_ids) == [7, 8]
            fake.answer = streams(part([7], "stop", 0), DONE)
            assert list((await client.generate([5], STREAMED)).token_ids) == [7]

    asyncio.run(scenario())


def test_a_request_that_was_ended_while_it_waited_keeps_what_came() -> None:
    """SGLang then repeats the last token that it had, whatever was sent before."""

    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = streams(
                part([7, 8], "", 0), part([4], "abort", 2, completion_tokens=5), DONE
            )
            sampled = await client.generate([5], STREAMED)
            assert (list(sampled.token_ids), sampled.finish_reason) == ([7, 8], "abort")
            assert sampled.versions == (VersionSpan(3, 2),)

    asyncio.run(scenario())


def test_tokens_of_a_broken_answer_count_as_the_older_of_two_versions() -> None:
    parts = [("3", 2), ("3", 2), ("4", 2), ("4", 2)]

    async def scenario() -> None:
        async with fake_server() as (fake, client):
            events = [part([7] * n, "", 2 * i, weight_version=v) for i, (v, n) in enumerate(parts)]
            fake.answer = streams(*events, dies=True)
            with pytest.raises(BrokenGeneration) as caught:
                await client.generate([5], STREAMED)
            assert caught.value.sampled.versions == (VersionSpan(3, 6), VersionSpan(4, 2))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("second", "hint"),
    [
        (part([9], "", 3), "4 completion_tokens, but 2 came before"),
        (part([9], "", 2, output_token_logprobs=[]), "log-probs are of other tokens"),
        (part([9], "", 2, weight_versions=[]), "do not cover"),
        (part([9], "", 2, weight_version="default"), "default"),
        (b'data: {"error": {"message": "out of memory"}}\n\n', "out of memory"),
        (b"data: nonsense\n\n", "not JSON"),
    ],
)
def test_a_part_that_does_not_add_up_is_rejected_and_the_parts_before_are_kept(
    second: bytes, hint: str
) -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = streams(part([7, 8], "", 0), second, DONE)
            with pytest.raises(BrokenGeneration, match=hint) as caught:
                await client.generate([5], STREAMED)
            assert list(caught.value.sampled.token_ids) == [7, 8]

    asyncio.run(scenario())


def test_a_request_that_the_engine_refuses_is_rejected() -> None:
    refused = {"type": "abort", "status_code": 400, "message": "too long"}

    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = streams(part([], "", 0, finish_reason=refused), DONE)
            with pytest.raises(EngineRejected, match="too long"):
                await client.generate([5], STREAMED)
            fake.answer = fake.fails
            with pytest.raises(EngineRejected, match="HTTP 500: scheduler died"):
                await client.generate([5], STREAMED)

    asyncio.run(scenario())
