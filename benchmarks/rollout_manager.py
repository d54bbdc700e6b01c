"""How much does the rollout manager add to what engines and tools take by themselves?

Run `.venv/bin/python benchmarks/rollout_manager.py [--json] [--episodes 1024] [--seed 0]
[--trace]`.

The real manager, driver, engine client and MCP tool pool run in one process on one core. Two more
processes share another core: an engine that speaks SGLang's HTTP and takes as long as a schedule
drawn from the seed says (`rollout_schedule.py`, `scripted_engine.py`), and a real MCP server over
stdio whose tool sleeps as long as its caller tells it to (`sleeping_tools.py`). Nothing is
simulated in between: chat template, tokenizer, call grammar, JSON, HTTP, MCP.

* `makespan_over_critical_path`: seconds of `RolloutManager.collect` over those of the longest
  episode, computed from the drawn latencies alone. 1 means that no episode ever waited for another
  one, nor for the manager. What the engine and the tool server need for themselves counts against
  the manager.
* `kib_per_episode`: growth of the manager's resident memory from just before the step to its
  largest value in it, over the number of episodes. All are started at once, and a finished one is
  kept until the step is handed over. `tokens_per_episode` says how much context that is.
* `speedup_over_reference`: makespan of the original's behaviour over ours, both measured here, one
  after the other, on the same smaller schedule (`--side-by-side` episodes, latencies times
  `SIDE_BY_SIDE_SCALE`): workers of a turn one after another, and a fresh tool-server process for
  each call, handshake and shut-down included, at most `MAX_STARTS` at a time. Everything else is
  our manager in both. Starting our small Python server costs far less than starting the Node server
  of the original, as the latencies are shorter too.

What does not depend on the machine: the critical path, the numbers of requests, and that the ratio
is 1 as long as the core keeps up (proved in virtual time by tests/unit/rollout/test_overlap.py).
What does: `cpu_s`, the manager's own seconds. About half of it is tokenizing what tools say. The
ratio stays near 1 while `cpu_s` is well below the critical path, so a slow or busy machine shows in
both; run it on an idle one with two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file: `benchmarks` is no installed package

from benchmarks import rollout_schedule as schedule  # noqa: E402
from benchmarks.scripted_engine import ScriptedEngine, write_model_folder  # noqa: E402
from megatron_matpo.agents.sampling import Sampled, Sampler  # noqa: E402
from megatron_matpo.agents.tools import ToolReply, ToolSpec  # noqa: E402
from megatron_matpo.config.agents import AgentConfig  # noqa: E402
from megatron_matpo.config.data import DataConfig  # noqa: E402
from megatron_matpo.config.rollout import RolloutConfig  # noqa: E402
from megatron_matpo.config.root import Config  # noqa: E402
from megatron_matpo.config.run import ObsConfig, RunConfig  # noqa: E402
from megatron_matpo.config.tools import McpServerConfig, ToolsConfig  # noqa: E402
from megatron_matpo.data.chat import Chat  # noqa: E402
from megatron_matpo.data.dataset import Question  # noqa: E402
from megatron_matpo.data.tokenizer import Tokenizer  # noqa: E402
from megatron_matpo.mcp_tools.pool import McpToolBox  # noqa: E402
from megatron_matpo.rollout.collect import RolloutManager  # noqa: E402
from megatron_matpo.rollout.engine_client import EngineClient  # noqa: E402
from megatron_matpo.rollout.fleet import Fleet  # noqa: E402
from megatron_matpo.rollout.generation import SamplingParams  # noqa: E402
from megatron_matpo.rollout.manager import ease_collector  # noqa: E402
from megatron_matpo.rollout.routing import Router  # noqa: E402
from megatron_matpo.types import PolicyVersion, RolloutBatch  # noqa: E402

MAX_STARTS = 32
"""Tool processes that the original's behaviour may have at a time; more would only queue."""
SIDE_BY_SIDE_SCALE = 0.25
"""Factor on the latencies of the comparison, which would otherwise take many minutes."""


@dataclass(frozen=True)
class Job:
    """One measurement, made in a process of its own."""

    folder: str
    """Holds the tokenizer; receives the tool server's log."""
    manager_core: int
    other_core: int
    """For engine and tool server."""
    num_episodes: int
    shape: dict[str, Any]
    """Fields of `rollout_schedule.Shape`."""
    is_reference: bool = False
    is_traced: bool = False
    """Record spans, as a run does with `obs.trace_every=1`."""
    port: int = 0
    """Of the engine."""


class SerialWorkers:
    """A sampler under which the workers of an episode run one after another, as in the original."""

    def __init__(self, inner: Sampler, engine: ScriptedEngine) -> None:
        """`engine` knows which agent a context belongs to, and how many turns it will have."""
        self._inner = inner
        self._engine = engine
        self._done: dict[tuple[int, int], asyncio.Event] = {}

    async def sample(self, ids: Sequence[int], max_tokens: int, conversation_id: str) -> Sampled:
        """As `Sampler.sample`."""
        episode, worker, turn = self._engine.find_turn(ids)
        if worker:
            await self._event(episode, worker - 1).wait()
        sampled = await self._inner.sample(ids, max_tokens, conversation_id)
        if worker is not None and turn + 1 == len(self._engine.agent(episode, worker).turns):
            self._event(episode, worker).set()
        return sampled

    def _event(self, episode: int, worker: int) -> asyncio.Event:
        return self._done.setdefault((episode, worker), asyncio.Event())


class ProcessPerCall:
    """A tool box that starts a server for each call and stops it afterwards, as in the original."""

    def __init__(self, config: ToolsConfig, log_dir: Path, specs: list[ToolSpec]) -> None:
        """`specs` as the real box lists them."""
        self._config = config
        self._log_dir = log_dir
        self._specs = specs
        self._gate = asyncio.Semaphore(MAX_STARTS)

    def specs(self) -> list[ToolSpec]:
        """As `ToolBox.specs`."""
        return self._specs

    async def call(self, server: str, tool: str, arguments: dict[str, Any]) -> ToolReply:
        """As `ToolBox.call`."""
        async with self._gate, McpToolBox(self._config, self._log_dir) as box:
            return await box.call(server, tool, arguments)


def make_config(job: Job) -> Config:
    """The recipe of a measurement."""
    on_core = ["-c", str(job.other_core), sys.executable]
    server = McpServerConfig(
        command="taskset",
        args=[*on_core, str(ROOT / "benchmarks" / "sleeping_tools.py")],
        max_concurrency=100_000,  # the critical path knows no queue
    )
    return Config(
        run=RunConfig(name="benchmark", dir=job.folder),
        data=DataConfig(prompts_per_step=job.num_episodes, samples_per_prompt=1),
        rollout=RolloutConfig(planner=schedule.PLANNER, max_concurrent_episodes=job.num_episodes),
        tools=ToolsConfig(servers={schedule.SERVER: server}),
        agents={
            schedule.PLANNER: AgentConfig(
                role="planner", tools=[schedule.WORKER], max_invalid_calls=100
            ),
            schedule.WORKER: AgentConfig(
                role="worker", tools=[schedule.SERVER], max_invalid_calls=100
            ),
        },
        obs=ObsConfig(record_rollouts=False, trace_every=int(job.is_traced)),
    )


async def measure(job: Job) -> dict[str, float]:
    """Collect one step and say what it took."""
    config, shape = make_config(job), schedule.Shape(**job.shape)
    planners = [schedule.make_episode(index, shape) for index in range(job.num_episodes)]
    texts = [schedule.question(index) for index in range(job.num_episodes)]
    rows = [Question("", text, text, schedule.ANSWER, "benchmark") for text in texts]
    async with AsyncExitStack() as stack:
        tokenizer = Tokenizer.load(job.folder)
        chat, played = Chat(tokenizer), ScriptedEngine(tokenizer, shape)
        engine = EngineClient(f"http://127.0.0.1:{job.port}")
        stack.push_async_callback(engine.close)
        log_dir = Path(job.folder) / "logs"
        box = await stack.enter_async_context(McpToolBox(config.tools, log_dir))
        tools = ProcessPerCall(config.tools, log_dir, box.specs()) if job.is_reference else box

        def params_for(max_tokens: int) -> SamplingParams:
            return SamplingParams(max_tokens, stop_token_ids=(chat.end_of_turn_id,))

        router = Router([engine], params_for, fleet=Fleet.unwatched([engine.url]))

        def sampler_for(version: PolicyVersion) -> Sampler:
            sampler = router.sampler(version)
            return SerialWorkers(sampler, played) if job.is_reference else sampler

        manager = RolloutManager(config, sampler_for, tools, chat, {"train": rows})
        ease_collector()
        idle_kib = _rss_kib()
        memory = asyncio.create_task(_peak_rss_kib())
        wall, cpu = time.monotonic(), time.process_time()
        batch = await manager.collect(1, 0)
        makespan_s, cpu_s = time.monotonic() - wall, time.process_time() - cpu
        memory.cancel()
        return _contexts(batch) | {
            "makespan_s": makespan_s,
            "critical_path_s": max(map(schedule.critical_path_s, planners)),
            "cpu_s": cpu_s,
            "kib_per_episode": (await memory - idle_kib) / job.num_episodes,
            "generations": sum(map(schedule.num_generations, planners)),
            "tool_calls": sum(map(schedule.num_tool_calls, planners)),
        }


def _rss_kib() -> float:
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE") / 1024


async def _peak_rss_kib() -> float:
    """The largest resident size seen until it is cancelled, looked at four times a second."""
    peak = 0.0
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            peak = max(peak, _rss_kib())
            await asyncio.sleep(0.25)
    return peak


def _contexts(batch: RolloutBatch) -> dict[str, float]:
    """How long the contexts became; an episode that failed makes the measurement worthless."""
    episodes = [episode for group in batch.groups for episode in group.episodes]
    if failed := [episode.failure for episode in episodes if episode.reward is None]:
        raise SystemExit(f"{len(failed)} of {len(episodes)} episodes failed: {failed[0]}")
    wrong = [episode.id for episode in episodes if episode.answer != schedule.ANSWER]
    if wrong:
        raise SystemExit(f"{len(wrong)} episodes left the schedule, such as {wrong[0]}")
    tokens = sorted(item.num_tokens for episode in episodes for item in episode.trajectories)
    return {
        "episodes": len(episodes),
        "contexts": len(tokens),
        "tokens_median": tokens[len(tokens) // 2],
        "tokens_p95": tokens[len(tokens) * 95 // 100],
        "tokens_max": tokens[-1],
        "tokens_per_episode": sum(tokens) / len(episodes),
    }


@contextlib.contextmanager
def running_engine(job: Job) -> Iterator[int]:
    """A scripted engine in a process of its own; yields its port."""
    command = [
        *("taskset", "-c", str(job.other_core), sys.executable, "-m", "benchmarks.scripted_engine"),
        *("--model", job.folder, "--shape", json.dumps(job.shape)),
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the scripted engine did not start; its error is above")
            yield int(line)
        finally:
            process.terminate()


def run_job(job: Job) -> dict[str, float]:
    """`measure` in a process of its own, pinned to the manager's core, with its own engine."""
    with running_engine(job) as port:
        text = json.dumps(asdict(replace(job, port=port)))
        command = ["taskset", "-c", str(job.manager_core), sys.executable, __file__, "--job", text]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the measurement ended with code {done.returncode}; its error is above")
    result = json.loads(done.stdout)
    result["makespan_over_critical_path"] = result["makespan_s"] / result["critical_path_s"]
    return result


def _print_table(columns: dict[str, dict[str, float]]) -> None:
    print(f"{'':<28}" + "".join(f"{name:>16}" for name in columns))
    for key in next(iter(columns.values())):
        values = [column[key] for column in columns.values()]
        print(f"{key:<28}" + "".join(f"{value:>16,.3f}" for value in values))


def main() -> None:
    """Measure three times and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--episodes", type=int, default=1024)
    parser.add_argument("--side-by-side", type=int, default=32, help="episodes of both behaviours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", action="store_true", help="record spans in the first column")
    parser.add_argument("--json", action="store_true", help="the last line is one object")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job is not None:
        print(json.dumps(asyncio.run(measure(Job(**arguments.job)))))
        return
    shape = schedule.Shape(seed=arguments.seed)
    short = replace(shape, time_scale=shape.time_scale * SIDE_BY_SIDE_SCALE)
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(Path(folder))
        job = Job(folder, cores[0], cores[-1], arguments.episodes, asdict(shape))
        small = replace(job, num_episodes=arguments.side_by_side, shape=asdict(short))
        whole = run_job(replace(job, is_traced=arguments.trace))
        ours, reference = run_job(small), run_job(replace(small, is_reference=True))
    _print_table({"manager": whole, "side by side": ours, "as the original": reference})
    speedup = reference["makespan_s"] / ours["makespan_s"]
    print(f"speedup_over_reference {speedup:.2f} ({arguments.side_by_side} episodes)")
    if arguments.json:
        keys = ("makespan_over_critical_path", "kib_per_episode")
        print(json.dumps({key: whole[key] for key in keys} | {"speedup_over_reference": speedup}))


if __name__ == "__main__":
    main()
