"""The manager process: `python -m megatron_matpo.rollout.manager --run-dir RUN`.

Reads `RUN/config.yaml` and `RUN/plan.json`; listens on the plan's manager address. Environment:
`MATPO_RUN_TOKEN` (what clients have to show) and `MATPO_ENGINE_KEY` (what the engines ask for);
neither is ever logged. SIGINT and, without `run.save_on_stop`, SIGTERM end it with exit code 0, its
tool servers stopped; a failure ends it with one line on stderr and the error's exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from megatron_matpo.cache import ReplyCache
from megatron_matpo.config import Config, load_resolved
from megatron_matpo.config.evaluation import TRAIN_SPLIT
from megatron_matpo.config.hf_model import end_token_ids
from megatron_matpo.config.plan import Plan
from megatron_matpo.data.chat import Chat
from megatron_matpo.data.dataset import Question, read_questions
from megatron_matpo.data.tokenizer import Tokenizer
from megatron_matpo.errors import ConfigError, MatpoError, RolloutError
from megatron_matpo.mcp_tools.toolbox import open_tool_box
from megatron_matpo.obs.failure import record_failure
from megatron_matpo.obs.restart_request import request_restart
from megatron_matpo.rewards.judge import Judge
from megatron_matpo.rollout.collect import RolloutManager
from megatron_matpo.rollout.engine_client import EngineClient
from megatron_matpo.rollout.fleet import Fleet
from megatron_matpo.rollout.generation import SamplingParams
from megatron_matpo.rollout.routing import Availability, Router
from megatron_matpo.rollout.server import ManagerServer
from megatron_matpo.rollout.sglang_router.behind import BehindRouter
from megatron_matpo.rollout.sglang_router.process import sglang_router

__all__ = ["RolloutManager", "main", "serve"]

_log = logging.getLogger(__name__)


async def serve(config: Config, plan: Plan, run_dir: Path, token: str, engine_key: str) -> None:
    """Serve until cancelled; then requests end first, tool servers and engine clients after them.

    Raises:
        ConfigError, DataError, ToolError: the manager cannot start.
        RolloutError: the manager's address is taken.
    """
    server = ManagerServer(token)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.close)
        try:
            await server.start(plan.manager_host, plan.manager_port)
        except OSError as error:
            where = f"{plan.manager_host}:{plan.manager_port}"
            raise RolloutError(f"the manager cannot listen on {where}: {error}") from error
        chat = Chat(Tokenizer.load(config.model.path))
        questions = load_questions(config)
        kept = config.tools.cache
        cache = ReplyCache(kept, Path(kept.path or run_dir / "cache.sqlite"))
        stack.callback(cache.close)
        judge = await stack.enter_async_context(
            Judge(config.reward.judge, cache if kept.judge else None)
        )
        server.detail = "starting tool servers"
        opening = open_tool_box(config.tools, run_dir / "logs", cache)
        tools = await stack.enter_async_context(opening)
        engines = _connect(config, plan, engine_key, stack)
        fleet = _fleet_of(engines, config, run_dir)
        behind = None
        router = _router_of(engines, fleet, config, chat)
        if config.rollout.router == "sglang":
            server.detail = "starting SGLang's router"
            client, behind = await _start_router(fleet, config, plan, run_dir, engine_key, stack)
            router = _router_of([client], behind, config, chat)
        manager = RolloutManager(config, router.sampler, tools, chat, questions, judge, router)
        stack.push_async_callback(manager.close)
        stack.push_async_callback(server.close)  # requests end before what they use
        num_questions = sum(map(len, questions.values()))
        detail = f"{num_questions} questions, {len(engines)} engines"
        server.set_ready(manager, fleet, detail)
        _log.info("ready: %s", detail)
        await _run_all(fleet, behind)


def _connect(
    config: Config, plan: Plan, engine_key: str, stack: AsyncExitStack
) -> list[EngineClient]:
    """A client for every engine of the plan."""
    limit = config.rollout.request_timeout_s
    engines = [
        EngineClient(place.url, engine_key, request_timeout_s=limit) for place in plan.engines
    ]
    for engine in engines:
        stack.push_async_callback(engine.close)
    return engines


def _fleet_of(engines: Sequence[EngineClient], config: Config, run_dir: Path) -> Fleet:
    return Fleet(
        engines,
        config.rollout.health,
        # `matpo eval` has no training rows: its engines serve the model folder.
        has_trainer=bool(config.data.train),
        ask_restart=lambda index, why: request_restart(run_dir, f"engine-{index}", why),
    )


async def _start_router(
    fleet: Fleet,
    config: Config,
    plan: Plan,
    run_dir: Path,
    engine_key: str,
    stack: AsyncExitStack,
) -> tuple[EngineClient, BehindRouter]:
    """SGLang's router as the one engine that is asked, and the fleet behind it."""
    rollout, log = config.rollout, run_dir / "logs" / "router.log"
    starting = sglang_router(
        rollout.python,
        plan.manager_host,
        engine_key,
        log,
        start_timeout_s=config.run.start_timeout_s,
    )
    control = await stack.enter_async_context(starting)
    client = EngineClient(control.url, engine_key, request_timeout_s=rollout.request_timeout_s)
    stack.push_async_callback(client.close)
    urls = [place.url for place in plan.engines]
    limit_s = rollout.health.no_engine_timeout_s
    return client, BehindRouter(fleet, urls, control, limit_s=limit_s, log=log)


async def _run_all(fleet: Fleet, behind: BehindRouter | None) -> None:
    """Until cancelled, or until one of them fails."""
    tasks = [asyncio.ensure_future(fleet.run())]
    if behind is not None:
        tasks.append(asyncio.ensure_future(behind.run()))
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _router_of(
    engines: Sequence[EngineClient], availability: Availability, config: Config, chat: Chat
) -> Router[SamplingParams]:
    rollout = config.rollout

    # The engine ends with the model's own, too; a turn in pieces must know all of them.
    stop_token_ids = (*{chat.end_of_turn_id, *end_token_ids(config.model.path)},)

    def params_for(max_tokens: int) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=max_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop_token_ids=stop_token_ids,
            stream_every=rollout.stream_tokens,
        )

    return Router(engines, params_for, stop_token_ids, fleet=availability)


def load_questions(config: Config) -> dict[str, list[Question]]:
    """Rows by split (see `RolloutManager`).

    `matpo eval` leaves `data.train` empty; training that never evaluates does not read `eval.sets`.
    """
    sources = {TRAIN_SPLIT: config.data.train} if config.data.train else {}
    if config.eval.is_wanted or not config.data.train:
        sources |= config.eval.named_sets
    folder = config.data.folder
    return {split: read_questions(source, folder) for split, source in sources.items()}


def ease_collector() -> None:
    """Let Python's cyclic collector look at new objects less often, and never at those of now.

    A step makes millions of small objects and drops nearly all of them by reference count. With
    Python's own thresholds the collector takes a tenth of the process, in pauses of up to half a
    second in which no episode moves.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 20)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description="Rollout manager of one run.")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder with config.yaml")
    run_dir: Path = parser.parse_args(argv).run_dir
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        config = load_resolved(str(run_dir / "config.yaml"))
        plan = Plan.from_json((run_dir / "plan.json").read_text(encoding="utf-8"))
        token, key = _secret("MATPO_RUN_TOKEN"), _secret("MATPO_ENGINE_KEY")
        ease_collector()
        asyncio.run(_serve_until_signal(config, plan, run_dir, token, key))
    except MatpoError as error:
        record_failure(run_dir, "manager", 0, "serve", error, traceback.format_exc())
        line = "; ".join(str(error).splitlines())
        print(f"rollout manager: {type(error).__name__}: {line}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        record_failure(run_dir, "manager", 0, "serve", error, traceback.format_exc())
        traceback.print_exc()
        print(f"rollout manager: internal error: {error!r}", file=sys.stderr, flush=True)
        return 1
    return 0


async def _serve_until_signal(
    config: Config, plan: Plan, run_dir: Path, token: str, engine_key: str
) -> None:
    task = asyncio.ensure_future(serve(config, plan, run_dir, token, engine_key))
    stopping = False

    def stop() -> None:
        nonlocal stopping
        if not stopping:  # a second signal must not break off the clean-up
            stopping = True
            task.cancel()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop)
    # A scheduler sends it to every process of a job. The trainer will ask for the groups in flight
    # to save them. Not SIG_IGN, which tool servers would inherit.
    save_on_stop = config.run.save_on_stop
    loop.add_signal_handler(signal.SIGTERM, (lambda: None) if save_on_stop else stop)
    try:
        await task
    except asyncio.CancelledError:
        if not stopping:
            raise
        _log.info("stopped")


def _secret(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise ConfigError(f"the environment variable {name} is not set; `matpo train` sets it")
    return value


if __name__ == "__main__":
    sys.exit(main())
