"""Proves the process: what it imports, one step over HTTP with real tool servers, SIGTERM, errors.

The engine is a stand-in that answers in SGLang's format with a scripted text; the tool servers, the
data set, the tokenizer and the manager are real.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import ClientSession, web

from megatron_matpo import wire
from megatron_matpo.config import Config, dump_config
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.data import DataConfig
from megatron_matpo.config.plan import EnginePlace, Plan
from megatron_matpo.config.tools import McpServerConfig, ToolsConfig
from megatron_matpo.config.train import ModelConfig
from megatron_matpo.ports import free_ports
from tests.helpers.rollouts import CHATML, byte_tokenizer, call, make_config, make_tokenizer
from tests.unit.data.test_dataset import row, write

ENV = {**os.environ, "MATPO_RUN_TOKEN": "run-token-1", "MATPO_ENGINE_KEY": "engine-key-2"}
SERVER = "search_and_scrape_webpage"
HEAVY = ("torch", "megatron", "sglang", "transformers", "numpy", "wandb", "openai")


def test_importing_the_manager_stays_light() -> None:
    code = (
        "import sys, megatron_matpo.rollout.manager\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def _config(folder: Path) -> Config:
    model = folder / "model"
    model.mkdir()
    byte_tokenizer().save(str(model / "tokenizer.json"))
    (model / "chat_template.jinja").write_text(CHATML)
    documents = folder / "documents.jsonl"
    documents.write_text(
        json.dumps(
            {"id": "1", "url": "https://e.example/ada", "title": "Ada", "text": "It is Ada."}
        )
    )
    rows = [row(index) for index in range(3)]
    data = str(write(folder / "data.parquet", rows))
    base = make_config(str(folder), planner="main_agent", max_failed_frac=0.0)
    server = McpServerConfig(
        command="python",
        args=["-m", "megatron_matpo.mcp_tools.corpus_server", "--documents", str(documents)],
    )
    return replace(
        base,
        model=ModelConfig(path=str(model)),
        data=DataConfig(train=data, prompts_per_step=2, samples_per_prompt=2),
        tools=ToolsConfig(servers={SERVER: server}),
        agents={
            "main_agent": AgentConfig(
                role="planner", tools=["browsing_agent"], final_summary="never"
            ),
            "browsing_agent": AgentConfig(role="worker", tools=[SERVER], final_summary="never"),
        },
    )


def _write_run(config: Config, engine_port: int) -> tuple[Path, Plan]:
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True)
    place = EnginePlace(0, 0, "127.0.0.1", engine_port, 0, ())
    plan = Plan(("127.0.0.1",), 0, (1,), free_ports("127.0.0.1", 1)[0], 0, (place,))
    (run_dir / "config.yaml").write_text(dump_config(config))
    (run_dir / "plan.json").write_text(plan.to_json())
    return run_dir, plan


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[Path, Plan]]:
    yield _write_run(_config(tmp_path), free_ports("127.0.0.1", 1)[0])


def _start(run_dir: Path, env: dict[str, str] = ENV) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_matpo.rollout.manager", "--run-dir", str(run_dir)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _says(context: str) -> str:
    """The scripted policy: delegate, search, report, answer."""
    if "Your current subtask" in context:
        if "user\n{" in context:
            return "It is Ada."
        return call(SERVER, "google_search", q="Ada", gl="us", hl="en")
    if "user\nIt is Ada." in context:
        return "\\boxed{Ada}"
    return call("browsing_agent", "search_and_browse", subtask="Who?")


def _engine(version: int) -> web.Application:
    tokenizer = make_tokenizer(CHATML)

    async def generate(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer engine-key-2"
        body = await request.json()
        assert tokenizer.decode(body["sampling_params"]["stop_token_ids"]) == "<|im_end|>"
        ids = tokenizer.encode(_says(tokenizer.decode(body["input_ids"])) + "<|im_end|>")
        meta: dict[str, Any] = {
            "id": "x",
            "finish_reason": {"type": "stop", "matched": ids[-1]},
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(ids),
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
            "weight_version": str(version),
            "weight_versions": [{"version": str(version), "start": 0, "end": len(ids)}],
        }
        return web.json_response({"text": "", "output_ids": ids, "meta_info": meta})

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    async def info(request: web.Request) -> web.Response:
        return web.json_response({"weight_version": str(version)})

    app = web.Application()
    app.router.add_post("/generate", generate)
    app.router.add_get("/health_generate", health)
    app.router.add_get("/model_info", info)
    return app


async def _ready(session: ClientSession, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        assert process.poll() is None, process.stdout and process.stdout.read()
        try:
            async with session.get("/health") as reply:
                if (await reply.json())["ready"]:
                    return
        except OSError:
            pass
        await asyncio.sleep(0.05)
    raise AssertionError("the manager did not become ready")


def _collect(run: tuple[Path, Plan], version: int, asked: int) -> tuple[int, bytes, str, int]:
    """HTTP status and body of one step, the log, and the exit code after SIGTERM."""
    run_dir, plan = run

    async def client(process: subprocess.Popen[str]) -> tuple[int, bytes]:
        runner = web.AppRunner(_engine(version))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", plan.engines[0].port).start()
        try:
            async with ClientSession(plan.manager_url) as session:
                await _ready(session, process)
                body = {"step": 1, "policy_version": asked, "split": "train"}
                headers = {"Authorization": "Bearer run-token-1"}
                # As the trainer after a push.
                word = {"version": asked, "engines": [0]}
                for path in ("/fleet/refitting", "/fleet/refitted"):
                    async with session.post(path, json=word, headers=headers) as reply:
                        assert reply.status == 200
                async with session.post("/collect", json=body, headers=headers) as reply:
                    return reply.status, await reply.read()
        finally:
            await runner.cleanup()

    process = _start(run_dir)
    try:
        status, body = asyncio.run(client(process))
        children = psutil.Process(process.pid).children(recursive=True)
        assert children, "the tool server runs as a child of the manager"
        process.send_signal(signal.SIGTERM)
        log, _ = process.communicate(timeout=20)
        assert not any(child.is_running() for child in children)
    finally:
        process.kill()
    return status, body, log, process.returncode


@pytest.mark.smoke
def test_a_step_over_http_and_a_clean_end(run: tuple[Path, Plan]) -> None:
    status, body, log, code = _collect(run, version=4, asked=4)
    assert status == 200, body
    batch = wire.decode(body)
    episodes = [episode for group in batch.groups for episode in group.episodes]
    assert [episode.answer for episode in episodes] == ["Ada"] * 4
    assert all(len(episode.workers) == 1 for episode in episodes)
    assert batch.metrics["tools/calls"] == 4
    versions = {
        s.version for e in episodes for t in e.trajectories for u in t.turns for s in u.versions
    }
    assert versions == {4}
    assert code == 0
    for secret in ("run-token-1", "engine-key-2"):
        assert secret not in log


@pytest.mark.smoke
def test_an_engine_that_missed_a_push_waits_for_weights(run: tuple[Path, Plan]) -> None:
    status, body, log, _ = _collect(run, version=3, asked=4)
    assert (status, json.loads(body)) == (202, {"refit": [0]})
    assert "-> stale: holds version '3' instead of 4" in log


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        ("token", "MATPO_RUN_TOKEN is not set", 2),
        ("tools", "ToolError: ", 1),
        ("port", "cannot listen on 127.0.0.1:", 1),
        ("data", "no such file or folder", 2),
        ("config", "config.yaml", 2),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, change: str, words: str, code: int) -> None:
    config = _config(tmp_path)
    env = dict(ENV)
    if change == "token":
        del env["MATPO_RUN_TOKEN"]
    if change == "tools":
        broken = McpServerConfig(command="python", args=["-c", "raise SystemExit('no key')"])
        config = replace(config, tools=ToolsConfig(servers={SERVER: broken}))
    if change == "data":
        config = replace(config, data=replace(config.data, train="nowhere.parquet"))
    run_dir, plan = _write_run(config, free_ports("127.0.0.1", 1)[0])
    if change == "config":
        (run_dir / "config.yaml").unlink()
    if change == "port":
        import socket

        taken = socket.create_server((plan.manager_host, plan.manager_port))
    process = _start(run_dir, env)
    log, _ = process.communicate(timeout=60)
    if change == "port":
        taken.close()
    assert process.returncode == code, log
    assert words in log.splitlines()[-1] and "Traceback" not in log


def test_a_signal_while_starting_ends_it(run: tuple[Path, Plan]) -> None:
    process = _start(run[0])
    time.sleep(2.0)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode in (0, -signal.SIGTERM)
