"""Proves how the client treats what a server may do to it, with a fake that speaks SGLang's HTTP.

That a real server speaks the same is proved by `tests/smoke/test_engine.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from megatron_matpo.errors import EngineError, EngineRejected, EngineTimeout, EngineUnreachable
from megatron_matpo.rollout.engine_client import EngineClient
from megatron_matpo.rollout.generation import SamplingParams
from megatron_matpo.types import VersionSpan
from tests.helpers.fake_sglang import fake_server, generation

PARAMS = SamplingParams(max_new_tokens=3, temperature=0.5, stop_token_ids=(2,))


def answers(value: Any) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(text=value) if isinstance(value, str) else web.json_response(value)

    return answer


def test_generation_is_tokens_in_and_tokens_out() -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):
            sampled = await client.generate([5, 6], PARAMS)
            assert list(sampled.token_ids) == [7, 8, 2]
            assert list(sampled.logprobs) == [-0.5, -1.5, -0.25]
            assert sampled.finish_reason == "stop"
            assert sampled.versions == (VersionSpan(3, 1), VersionSpan(4, 2))
            ((method, path, body, key),) = fake.asked
            assert (method, path, key) == ("POST", "/generate", "Bearer the-key")
            assert body["input_ids"] == [5, 6] and body["return_logprob"] is True
            assert body["sampling_params"]["stop_token_ids"] == [2]
            assert body["sampling_params"]["temperature"] == 0.5
            assert "text" not in body

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"output_token_logprobs": [[-0.5, 7, None]]}, "log-probs are of other tokens"),
        ({"output_token_logprobs": None}, "log-probs are of other tokens"),
        (
            {"output_token_logprobs": [[None, 7, None], [-1.5, 8, None], [0, 2, None]]},
            "TypeError",
        ),
        (
            {"output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None], ["-1", 2, None]]},
            "TypeError",
        ),
        ({"weight_versions": [{"version": "3", "start": 0, "end": 2}]}, "do not cover"),
        ({"weight_versions": [{"version": "default", "start": 0, "end": 3}]}, "default"),
        ({"finish_reason": None}, "did not end"),
    ],
)
def test_an_answer_that_does_not_add_up_is_rejected(change: dict[str, Any], hint: str) -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = answers(generation(**change))
            with pytest.raises(EngineRejected, match=hint):
                await client.generate([5], PARAMS)

    asyncio.run(scenario())


@pytest.mark.parametrize("ids", [[7.5], [2**40], [-1], ["7"], "7", None, [[7]], 7])
def test_token_ids_that_are_none_are_rejected(ids: Any) -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):
            rows = [[-0.5, item, None] for item in ids] if isinstance(ids, list) else []
            spans = [{"version": "3", "start": 0, "end": len(rows)}]
            meta = generation(output_token_logprobs=rows, weight_versions=spans)
            fake.answer = answers(meta | {"output_ids": ids})
            with pytest.raises(EngineRejected, match="not a generation"):
                await client.generate([5], PARAMS)

    asyncio.run(scenario())


def test_an_endless_answer_is_not_read_to_its_end() -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = fake.floods
            with pytest.raises(EngineRejected, match="longer than 16 MiB"):
                await client.generate([5], PARAMS)
            await asyncio.wait_for(fake.aborted.wait(), 2)
            fake.answer = fake.generates
            assert len((await client.generate([5], PARAMS)).token_ids) == 3

    asyncio.run(scenario())


GARBAGE = ["", "<html>", "[1, 2]", "null", "{}", '{"meta_info": 3}', "[" * 100_000]


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_is_rejected(text: str) -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = answers(text)
            with pytest.raises(EngineRejected):
                await client.generate([5], PARAMS)

    asyncio.run(scenario())


def test_http_error_is_rejected_with_a_short_message() -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = fake.fails
            with pytest.raises(EngineRejected, match="HTTP 500: scheduler died") as caught:
                await client.generate([5], PARAMS)
            assert len(str(caught.value)) < 1000

    asyncio.run(scenario())


@pytest.mark.parametrize("behaviour", ["hangs", "drips"])
def test_deadline_names_its_setting(behaviour: str) -> None:
    async def scenario() -> None:
        async with fake_server(limit_s=0.2) as (fake, client):
            fake.answer = getattr(fake, behaviour)
            started = time.monotonic()
            with pytest.raises(EngineTimeout, match=r"rollout\.request_timeout_s=0\.2"):
                await client.generate([5], PARAMS)
            assert time.monotonic() - started < 2

    asyncio.run(scenario())


def test_cancelling_closes_the_connection() -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = fake.hangs
            task = asyncio.create_task(client.generate([5], PARAMS))
            while not fake.asked:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(fake.aborted.wait(), 2)

    asyncio.run(scenario())


def test_no_server_and_broken_connection_are_unreachable() -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = fake.breaks_off
            with pytest.raises(EngineUnreachable):
                await client.generate([5], PARAMS)
            url = client.url
        gone = EngineClient(url)
        with pytest.raises(EngineUnreachable, match="request_timeout_s"):
            await gone.generate([5], PARAMS)
        await gone.close()
        await gone.close()

    asyncio.run(scenario())


def test_wait_ready_waits_for_a_generation() -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):

            async def starting(request: web.Request) -> web.StreamResponse:
                ready = len(fake.asked) > 2
                return web.Response(status=200 if ready else 503)

            fake.answer = starting
            await client.wait_ready(deadline_s=5)
            assert [path for _, path, _, _ in fake.asked] == ["/health_generate"] * 3

    asyncio.run(scenario())


def test_wait_ready_ends_with_the_process_or_the_deadline() -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = fake.fails
            with pytest.raises(EngineTimeout, match=r"not ready after 0\.5 s; last: .*HTTP 500"):
                await client.wait_ready(deadline_s=0.5)
            fake.answer = fake.hangs
            with pytest.raises(EngineTimeout, match=r"not ready after 0\.3 s"):
                await client.wait_ready(deadline_s=0.3)
            with pytest.raises(EngineUnreachable, match="process ended"):
                await client.wait_ready(deadline_s=5, process_alive=lambda: False)

    asyncio.run(scenario())


def update(client: EngineClient) -> Awaitable[None]:
    return client.update_weights_from_distributed(
        names=("a",),
        dtypes=("float32",),
        shapes=((2, 3),),
        group_name="g",
        weight_version="5",
        load_format="flattened_bucket",
        flush_cache=True,
        deadline_s=1,
    )


def test_control_verbs_speak_sglang() -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = answers({"success": True, "message": "", "weight_version": "5"})
            await client.pause(mode="in_place", deadline_s=1)
            await client.init_weights_update_group(
                master_address="h",
                master_port=1,
                rank_offset=1,
                world_size=2,
                group_name="g",
                backend="gloo",
                deadline_s=1,
            )
            await update(client)
            await client.flush_cache(deadline_s=1)
            await client.resume(deadline_s=1)
            await client.destroy_weights_update_group(group_name="g", deadline_s=1)
            assert await client.weight_version(deadline_s=1) == "5"
            bodies = {path: body for _, path, body, _ in fake.asked}
            assert bodies["/pause_generation"] == {"mode": "in_place"}
            assert bodies["/update_weights_from_distributed"] == {
                "names": ["a"],
                "dtypes": ["float32"],
                "shapes": [[2, 3]],
                "group_name": "g",
                "weight_version": "5",
                "load_format": "flattened_bucket",
                "flush_cache": True,
            }
            assert bodies["/init_weights_update_group"]["rank_offset"] == 1
            assert bodies["/destroy_weights_update_group"] == {"group_name": "g"}
            assert set(bodies) >= {"/flush_cache", "/continue_generation", "/model_info"}

    asyncio.run(scenario())


def test_a_pause_that_aborts_waits_for_nothing_that_runs() -> None:
    """SGLang's own mode would look again after a second."""

    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = answers({})
            await client.pause(mode="abort", deadline_s=1)
            assert [(path, body) for _, path, body, _ in fake.asked] == [
                ("/abort_request", {"rid": "", "abort_all": True}),
                ("/pause_generation", {"mode": "retract"}),
                ("/abort_request", {"rid": "", "abort_all": True}),
            ]

    asyncio.run(scenario())


@pytest.mark.parametrize("answer", [{"success": False, "message": "group g is unknown"}, {}])
def test_a_failed_command_is_rejected(answer: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, client):
            fake.answer = answers(answer)
            with pytest.raises(EngineRejected, match="update_weights_from_distributed"):
                await update(client)
            with pytest.raises(EngineRejected, match="weight_version"):
                await client.weight_version(deadline_s=1)

    asyncio.run(scenario())


def test_one_except_clause_catches_all() -> None:
    assert issubclass(EngineError, RuntimeError)
    for kind in (EngineRejected, EngineTimeout, EngineUnreachable):
        assert issubclass(kind, EngineError)
