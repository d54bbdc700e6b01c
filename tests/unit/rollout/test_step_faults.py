"""Proves that faults of engine, tools and judge stay inside their episodes.

The real manager, driver, engine client, tool pool and judge client run a step against a fake of
SGLang and a fake of a paid judge over real HTTP, and real MCP servers that misbehave. Each episode
draws what befalls it: hang, crash, garbage, 10 MB, a slow drip. Every episode ends with a status,
the step completes or stops with the counted reasons, and no process, file handle, socket or task is
left. Deadlines are short; that they held is seen by the step ending inside a far larger limit.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web

from megatron_matpo.agents.tools import ToolReply, ToolSpec
from megatron_matpo.config.data import DataConfig
from megatron_matpo.config.reward import JudgeConfig, RewardConfig
from megatron_matpo.config.root import Config
from megatron_matpo.config.tools import ToolsConfig
from megatron_matpo.data.chat import Chat
from megatron_matpo.data.tokenizer import Tokenizer
from megatron_matpo.errors import RolloutError
from megatron_matpo.mcp_tools.pool import McpToolBox
from megatron_matpo.rewards.judge import Judge
from megatron_matpo.rollout import scheduler
from megatron_matpo.rollout.collect import RolloutManager
from megatron_matpo.rollout.engine_client import EngineClient
from megatron_matpo.rollout.fleet import Fleet
from megatron_matpo.rollout.generation import SamplingParams
from megatron_matpo.rollout.routing import Router
from megatron_matpo.types import RolloutBatch, Status
from tests.helpers.fake_judge import FakeJudge
from tests.helpers.rogue import rogue
from tests.helpers.rollouts import (
    CHATML,
    call,
    delegate,
    make_config,
    make_question,
    make_tokenizer,
)

FAR_LIMIT_S = 120.0
ENGINE_FAULTS = ("hang", "crash", "error", "garbage", "huge", "drip", "wrong_version", "abort")
TOOL_FAULTS = ("sleep", "die", "nonsense", "drip")
JUDGE_FAULTS = ("hang", "crash", "http_500", "not_json", "huge", "drip", "a good question")
FATES = [
    *(f"engine {kind}" for kind in ENGINE_FAULTS),
    *(f"tool {kind}" for kind in TOOL_FAULTS),
    *(f"judge {kind}" for kind in JUDGE_FAULTS),
    *("tool big", "tool echo", "none"),  # these end well
]
COPIES = 3
_FATE = re.compile(r"Fate: (\w+) ?([^.\n]*)\.")
_TEN_MB = 10 * 2**20


@dataclass
class FakeSglang:
    """Speaks SGLang's `/generate`: the planner delegates once, the worker calls a tool once."""

    tokenizer: Tokenizer
    end_id: int

    async def generate(self, request: web.Request) -> web.StreamResponse:
        text = self.tokenizer.decode((await request.json())["input_ids"])
        found = _FATE.search(text)
        where, kind = (found[1], found[2]) if found else ("none", "")
        is_worker = "Your current subtask" in text
        num_turns = text.count("<|im_start|>assistant") - 1
        if where == "engine" and is_worker and num_turns == 1:
            return await self._misbehave(request, kind)
        if num_turns:
            said = "report" if is_worker else "\\boxed{Ada}"
        elif is_worker:
            said = call("web", "call", kind=kind if where == "tool" else "echo")
        else:
            said = delegate("look it up")
        return web.json_response(self._generation(said))

    def _generation(self, said: str, version: str = "0") -> dict[str, Any]:
        ids = [*self.tokenizer.encode(said), self.end_id]
        spans = [{"version": version, "start": 0, "end": len(ids)}]
        meta = {
            "finish_reason": {"type": "stop"},
            "completion_tokens": len(ids),
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
            "weight_version": version,
            "weight_versions": spans,
        }
        return {"text": "", "output_ids": ids, "meta_info": meta}

    async def _misbehave(self, request: web.Request, kind: str) -> web.StreamResponse:
        match kind:
            case "hang":
                await asyncio.sleep(3600)
            case "crash":
                assert request.transport is not None
                request.transport.abort()
            case "error":
                return web.Response(status=500, text="scheduler died")
            case "garbage":
                return web.Response(text='{"output_ids": "\x00')
            case "huge":
                return web.Response(body=b" " * _TEN_MB + b'{"output_ids": []}')
            case "drip":
                response = web.StreamResponse()
                await response.prepare(request)
                while True:
                    await response.write(b" ")
                    await asyncio.sleep(0.02)
            case "wrong_version":
                return web.json_response(self._generation("report", version="7"))
            case "abort":
                meta = {"finish_reason": {"type": "abort"}, "completion_tokens": 0}
                return web.json_response({"output_ids": [], "meta_info": meta})
        return web.Response()


class RogueTools:
    """Speaks `ToolBox`: one tool, which passes the call on to the server of the fault it names."""

    def __init__(self, servers: McpToolBox) -> None:
        self._servers = servers

    def specs(self) -> list[ToolSpec]:
        kind = {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}
        return [ToolSpec("web", "call", "Anything may happen.", kind)]

    async def call(self, server: str, tool: str, arguments: dict[str, Any]) -> ToolReply:
        kind = arguments["kind"]
        details = {"sleep": {"seconds": 3600}, "big": {"chars": _TEN_MB}, "echo": {"text": "hello"}}
        reply = await self._servers.call(kind, kind, details.get(kind, {}))
        return replace(reply, text=reply.text[:200])


@asynccontextmanager
async def listening(fake: FakeSglang) -> AsyncIterator[str]:
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/generate", fake.generate)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def settings(max_failed_frac: float) -> Config:
    base = make_config(context_length=9000, max_episode_retries=0, max_failed_frac=max_failed_frac)
    # One process per fault: what breaks one server must not be blamed on another.
    # Only faults get a short deadline: three replies of 10 MB take their time on a busy machine.
    deadlines = dict.fromkeys(TOOL_FAULTS, 2.0) | dict.fromkeys(("big", "echo"), FAR_LIMIT_S)
    servers = {
        kind: rogue(call_timeout_s=limit_s, max_attempts=2, backoff_s=0.01)
        for kind, limit_s in deadlines.items()
    }
    return replace(
        base,
        data=DataConfig(prompts_per_step=len(FATES), samples_per_prompt=COPIES),
        tools=ToolsConfig(servers),
        reward=RewardConfig(grader="judge"),
    )


def misjudge(_: int, prompt: str) -> str:
    """The judge's behaviour by the question that it is asked about."""
    found = _FATE.search(prompt)
    return found[2] if found and found[1] == "judge" else "A"


async def run_step(tmp_path: Path, max_failed_frac: float = 1.0) -> RolloutBatch:
    config = settings(max_failed_frac)
    tokenizer = make_tokenizer(CHATML)
    chat = Chat(tokenizer)
    rows = [make_question(f"Fate: {fate}. Who?") for fate in FATES]
    async with (
        asyncio.timeout(FAR_LIMIT_S),
        FakeJudge(misjudge) as fake_judge,
        listening(FakeSglang(tokenizer, chat.end_of_turn_id)) as url,
        McpToolBox(config.tools, tmp_path) as servers,
    ):
        judge_config = JudgeConfig(
            base_url=fake_judge.base_url,
            api_key_env="",
            timeout_s=3.0,
            max_attempts=2,
            backoff_s=0.01,
        )
        engine = EngineClient(url, request_timeout_s=6.0)

        def params_for(max_tokens: int) -> SamplingParams:
            return SamplingParams(max_tokens, stop_token_ids=(chat.end_of_turn_id,))

        try:
            async with Judge(judge_config) as judge:
                sampler_for = Router(
                    [engine], params_for, fleet=Fleet.unwatched([engine.url])
                ).sampler
                manager = RolloutManager(
                    config, sampler_for, RogueTools(servers), chat, {"train": rows}, judge
                )
                return await manager.collect(1, 0)
        finally:
            await engine.close()


def measured(tmp_path: Path, max_failed_frac: float = 1.0) -> RolloutBatch:
    """The second of two steps; it must leave nothing that was not there after the first."""

    async def step() -> RolloutBatch:
        try:
            return await run_step(tmp_path, max_failed_frac)
        finally:
            await asyncio.sleep(0.1)  # aborted connections are closed in the loop's next rounds
            own = asyncio.current_task()
            assert [task for task in asyncio.all_tasks() if task is not own] == []

    me = psutil.Process()

    def held() -> tuple[int, int, list[int]]:
        sockets = len(me.net_connections("inet"))
        return me.num_fds(), sockets, [child.pid for child in me.children(recursive=True)]

    with suppress(RolloutError):
        asyncio.run(step())
    before = held()
    try:
        return asyncio.run(step())
    finally:
        assert held() == before


@pytest.mark.slow
def test_every_fault_ends_its_own_episode_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "RETRY_PAUSE_S", 0.01)
    batch = measured(tmp_path)
    assert len(batch.groups) == len(FATES)
    failures: Counter[str] = Counter()
    for group in batch.groups:
        found = _FATE.search(group.question)
        assert found is not None
        where, kind = found[1], found[2]
        for episode in group.episodes:
            planner = episode.planner
            failures[where] += episode.reward is None
            if where == "engine":
                assert planner.status is Status.ENGINE_FAILURE, (kind, planner)
                assert episode.reward is None and episode.failure.startswith("engine_failure: ")
            elif where == "tool" and kind in TOOL_FAULTS:
                assert planner.status is Status.TOOL_FAILURE, (kind, planner)
                assert episode.reward is None and f"{kind}" in episode.failure
            elif where == "judge":
                assert planner.status is Status.ANSWERED and episode.answer in ("", "Ada")
                assert episode.reward is None and episode.failure.startswith("judge_failure: ")
            else:
                assert episode.reward is not None and episode.reward.total == 1.0, kind
                assert episode.reward.verdict == "correct"
    num_faults = {"engine": ENGINE_FAULTS, "tool": TOOL_FAULTS, "judge": JUDGE_FAULTS}
    assert failures == {
        **{where: COPIES * len(kinds) for where, kinds in num_faults.items()},
        "none": 0,
    }
    assert batch.metrics["rollout/failed"] == sum(failures.values())
    for where in num_faults:
        assert batch.metrics[f"rollout/failed_by/{where}_failure"] == failures[where]
    # Calls into a server that a fault kills may fail with it; those that hang fail by themselves.
    assert batch.metrics["tools/failures"] == COPIES * len(TOOL_FAULTS)
    assert batch.metrics["judge/failures"] >= COPIES * len(JUDGE_FAULTS)


@pytest.mark.slow
def test_too_many_faults_stop_the_step_with_the_counted_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "RETRY_PAUSE_S", 0.01)
    with pytest.raises(RolloutError) as caught:
        measured(tmp_path, max_failed_frac=0.5)
    text = str(caught.value)
    allowed = len(FATES) * COPIES // 2
    assert f"rollout.max_failed_frac=0.5 allows {allowed}: " in text
    assert f"{allowed + 1} of {len(FATES) * COPIES} episodes failed" in text
    assert re.search(r"\d+ x (engine|tool|judge)_failure: ", text)
