"""Proves that turns go on from their tokens over two stock SGLang servers: new weights, a death.

Every token's log-prob is compared with transformers under the weights of the version that the token
says it is of. The tests share the servers and run in order: the last two stop and kill one.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_matpo.errors import EngineRejected
from megatron_matpo.rollout.engine_client import EngineClient
from megatron_matpo.rollout.fleet import Fleet
from megatron_matpo.rollout.generation import Generation, SamplingParams
from megatron_matpo.rollout.routing import Router
from megatron_matpo.rollout.sglang_router.process import sglang_router
from megatron_matpo.types import VersionSpan
from tests.helpers.sglang_servers import (
    KEY,
    ROLLOUT_PYTHON,
    SglangServer,
    server_marks,
    sglang_servers,
)
from tests.helpers.tiny import make_tiny_model

LIMIT_S = 60.0
MAX_TOKENS = 600
PROMPTS = [[5, 6, 7 + i] for i in range(4)]

pytestmark = server_marks(400)


@dataclass
class Site:
    servers: list[SglangServer]
    models: list[Any]
    """By policy version."""
    other_weights: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("continuation")
    paths = [folder / "model", folder / "other"]
    for path in paths:
        make_tiny_model(path, tied=False)
        config = json.loads((path / "config.json").read_text())
        config |= {"max_position_embeddings": 2048, "eos_token_id": None}
        (path / "config.json").write_text(json.dumps(config))
        (path / "generation_config.json").unlink(missing_ok=True)
    weights = load_file(paths[0] / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    other = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in weights.items()}
    save_file(other, paths[1] / "model.safetensors", metadata={"format": "pt"})
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths]
    with sglang_servers(paths[0], folder, 2) as servers:
        yield Site(servers, models, paths[1])


def converse(
    site: Site, meanwhile: Callable[[Router[Any], list[EngineClient]], Awaitable[None]]
) -> list[Generation]:
    """A turn after each of `PROMPTS`, sampled while something happens."""

    async def run() -> list[Generation]:
        engines = [server.client(LIMIT_S) for server in site.servers]
        fleet = Fleet.unwatched([engine.url for engine in engines])
        fleet.refit_began([0, 1])
        fleet.refitted(1, [0, 1])
        params_for = partial(SamplingParams, stream_every=8)
        router = Router(engines, params_for, fleet=fleet)
        sampler = router.follower()
        try:
            turns = [
                asyncio.ensure_future(sampler.sample(prompt, MAX_TOKENS, str(i)))
                for i, prompt in enumerate(PROMPTS)
            ]
            await asyncio.sleep(1.0)
            ended = [turn for turn in turns if turn.done()]
            assert not ended, f"the test wants longer turns: {ended}"
            await meanwhile(router, engines)
            sampled = await asyncio.gather(*turns)
            assert router.num_continued > 0, "nothing happened to any turn"
            return sampled
        finally:
            for engine in engines:
                await engine.close()

    return asyncio.run(run())


def assert_is_what_was_sampled(site: Site, turns: list[Generation]) -> None:
    """Tokens are all there, and their log-probs are those of the weights they are of."""
    for prompt, turn in zip(PROMPTS, turns, strict=True):
        assert len(turn.token_ids) == MAX_TOKENS and turn.finish_reason == "length"
        tokens = torch.tensor([[*prompt, *turn.token_ids]])
        start = 0
        for part in turn.versions:
            model = site.models[part.version]
            with torch.no_grad():
                logits = model(tokens).logits[0, len(prompt) - 1 : -1].double()
            table = logits.log_softmax(-1)
            expected = table.gather(-1, tokens[0, len(prompt) :, None]).squeeze(-1)
            own = torch.tensor(turn.logprobs, dtype=torch.float64)
            stretch = slice(start, start + part.num_tokens)
            torch.testing.assert_close(own[stretch], expected[stretch], atol=1e-4, rtol=0)
            start += part.num_tokens
        assert start == MAX_TOKENS


def test_sglangs_router_sends_to_the_engines_it_was_told_of(site: Site, tmp_path: Path) -> None:
    urls = [server.url for server in site.servers]

    async def run() -> None:
        log = tmp_path / "router.log"
        starting = sglang_router(str(ROLLOUT_PYTHON), "127.0.0.1", KEY, log, start_timeout_s=60)
        async with starting as router:
            client = EngineClient(router.url, KEY)
            with pytest.raises(EngineRejected, match="HTTP 503"):
                await client.generate([5, 6], SamplingParams(4))
            for chosen in (urls, urls[:1], urls[1:]):
                await router.set_workers(chosen)
                assert {u for u, (_, is_used) in (await router.workers()).items() if is_used} == {
                    *chosen
                }
                params = SamplingParams(40, stream_every=8)
                turns = [client.generate([5, 6, 7 + i], params) for i in range(4)]
                for turn in await asyncio.gather(*turns):
                    assert (len(turn.token_ids), turn.finish_reason) == (40, "length")
                    assert turn.versions == (VersionSpan(0, 40),)
            await client.close()
            stranger = EngineClient(router.url, "another key")
            with pytest.raises(EngineRejected, match="HTTP 401"):
                await stranger.generate([5, 6], SamplingParams(4))
            await stranger.close()
        assert KEY not in log.read_text()

    asyncio.run(run())


def test_new_weights_in_the_middle_of_turns(site: Site) -> None:
    async def push(router: Router[Any], engines: list[EngineClient]) -> None:
        for engine in engines:
            await engine.pause(mode="abort", deadline_s=LIMIT_S)
        await asyncio.sleep(0.3)  # turns are sent again, and wait
        for engine in engines:
            await engine.update_weights_from_disk(
                folder=str(site.other_weights),
                weight_version="1",
                flush_cache=True,
                deadline_s=LIMIT_S,
            )
        for engine in engines:
            await engine.resume(deadline_s=LIMIT_S)

    turns = converse(site, push)
    assert [[part.version for part in turn.versions] for turn in turns] == [[0, 1]] * len(turns)
    assert_is_what_was_sampled(site, turns)


def test_an_engine_that_does_not_answer_is_given_up_with_what_it_had_sampled(site: Site) -> None:
    async def freeze(router: Router[Any], engines: list[EngineClient]) -> None:
        site.servers[1].signal(signal.SIGSTOP)
        await asyncio.sleep(0.5)
        await engines[1].close()

    try:
        turns = converse(site, freeze)
    finally:
        site.servers[1].signal(signal.SIGCONT)
    assert_is_what_was_sampled(site, turns)


def test_an_engine_that_is_killed_loses_no_token_that_it_had_sent(site: Site) -> None:
    async def kill(router: Router[Any], engines: list[EngineClient]) -> None:
        site.servers[1].signal(signal.SIGKILL)

    turns = converse(site, kill)
    assert_is_what_was_sampled(site, turns)
    assert {part.version for turn in turns for part in turn.versions} == {1}
