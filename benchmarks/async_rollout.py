"""How much faster is an asynchronous run than the synchronous one, where episodes have a long tail?

Run `.venv/bin/python benchmarks/async_rollout.py [--json] [--staleness 4] [--on-stale wait]
[--steps 6] [--seed 0]`.

Both runs ask the same questions with the same episodes and the same engines, one after the other.
Real: the rollout manager, driver, router and engine clients, HTTP, pauses in the middle of
generations, and turns that go on from their tokens. Played: what the policy says (it has no model),
how long decoding takes (`decoding_engine.py`), tools (they sleep), and training (it sleeps).

The workload is not made for this benchmark:

* Episodes are those of `matpo simulate` where nothing is recorded: planners, workers, turns, tokens
  and tool latencies drawn from `simulation/lengths/matpo.yaml` (after MATPO's limits; as
  `matpo_lengths.py` an assumption, since no recording is public).
* A step is a sixteenth of the recipe `matpo-qwen3-14b-16n8g-a800`: 16 questions of 8 episodes, 2
  engines of 64 places, instead of 256, and 32. (A larger step has a longer tail.)
* Engines decode as `matpo simulate` reckons for that recipe on A800: 59 tokens/s alone, 1235 in all
  with 32 sequences. Prefill is left out.
* Training takes 30 % of the synchronous step: about 70 % of the time of synchronous runs goes into
  rollout (RollPacker, arXiv:2509.21009, section 1). Weights take 4.4 s of recipe time to push.
* Times are divided by `TIME_SCALE`, numbers of tokens by `TOKEN_SCALE` (each stands for that many).

`speedup` is the ratio of episodes per second. `bound` is the most that any schedule could reach
with these engines and this trainer: the synchronous step over the longer of

* `trainer_bound_s`: training and push of a step, which nothing overlaps with;
* `engine_bound_s`: the tokens of a step at the engines' best rate, all places taken all the time.

It leaves out that an episode has to be trained within the bound on staleness, that turns of an
episode wait for each other, and pauses. AReaL reports 2.35x to 2.77x over synchronous systems
(arXiv:2505.24298). With `--on-stale wait`, as a run has by default, no episode is left out; with
`refresh`, what takes long is asked anew, and `refreshed_groups` says how often.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file: `benchmarks` is no installed package

from benchmarks.decoding_engine import Rates  # noqa: E402
from benchmarks.played_episodes import (  # noqa: E402
    PLANNER,
    SAMPLES,
    TIME_SCALE,
    TOKEN_SCALE,
    WORKER,
    Played,
    Script,
    SleepingTools,
)
from benchmarks.scripted_engine import write_model_folder  # noqa: E402
from megatron_matpo.agents.sampling import Sampler  # noqa: E402
from megatron_matpo.config.agents import AgentConfig  # noqa: E402
from megatron_matpo.config.data import DataConfig  # noqa: E402
from megatron_matpo.config.rollout import RolloutConfig  # noqa: E402
from megatron_matpo.config.root import Config  # noqa: E402
from megatron_matpo.config.run import ObsConfig, RunConfig  # noqa: E402
from megatron_matpo.data.chat import Chat  # noqa: E402
from megatron_matpo.data.dataset import Question  # noqa: E402
from megatron_matpo.data.tokenizer import Tokenizer  # noqa: E402
from megatron_matpo.rollout.collect import RolloutManager  # noqa: E402
from megatron_matpo.rollout.engine_client import EngineClient  # noqa: E402
from megatron_matpo.rollout.fleet import Fleet  # noqa: E402
from megatron_matpo.rollout.generation import SamplingParams  # noqa: E402
from megatron_matpo.rollout.routing import Router  # noqa: E402
from megatron_matpo.types import PolicyVersion, RolloutBatch  # noqa: E402

NUM_ENGINES, SLOTS = 2, 64
PROMPTS = 16
BASE_S, PER_SEQUENCE_S = 0.01666, 0.000289
"""Of recipe time: 59 tokens/s alone and 1235 with 32 sequences."""
PUSH_S = 4.4
ROLLOUT_SHARE = 0.7
EPISODES_PER_SLOT = 1.5
"""Episodes that run at the same time, per place of an engine: some wait for tools and workers."""


def make_config(folder: str, rollout: Mapping[str, Any]) -> Config:
    """The recipe of a run."""
    limits: dict[str, Any] = {"max_invalid_calls": 100, "final_summary": "never"}
    return Config(
        run=RunConfig(name="benchmark", dir=folder),
        data=DataConfig(prompts_per_step=PROMPTS, samples_per_prompt=SAMPLES),
        rollout=RolloutConfig(
            planner=PLANNER,
            max_concurrent_episodes=int(NUM_ENGINES * SLOTS * EPISODES_PER_SLOT),
            **rollout,
        ),
        agents={
            PLANNER: AgentConfig(role="planner", tools=[WORKER], **limits),
            WORKER: AgentConfig(role="worker", tools=["web"], **limits),
        },
        obs=ObsConfig(record_rollouts=False, trace_every=0),
    )


@dataclass(frozen=True)
class Measured:
    """A run after its warm-up: means per step."""

    step_s: float
    rollout_s: float
    episodes_per_s: float
    engines_busy: float
    """Share of the time in which engines decode."""
    tokens: float
    staleness_mean: float
    staleness_max: float
    refreshed_groups: float
    """All of the measured steps."""


class PlayedRun:
    """A run with the engines at `ports`."""

    def __init__(self, ports: Sequence[int], script: Script, config: Config, folder: Path) -> None:
        """Connects when it is entered."""
        self._ports, self._script, self._config, self._folder = ports, script, config, folder

    async def __aenter__(self) -> PlayedRun:
        """Clients, router and manager."""
        self._stack = AsyncExitStack()
        tokenizer = Tokenizer.load(self._folder)
        chat = Chat(tokenizer)
        self.engines = [EngineClient(f"http://127.0.0.1:{port}") for port in self._ports]
        for engine in self.engines:
            self._stack.push_async_callback(engine.close)
        self._session = await self._stack.enter_async_context(aiohttp.ClientSession())
        fleet = Fleet.unwatched([engine.url for engine in self.engines])
        router = Router(self.engines, SamplingParams, fleet=fleet)
        places: dict[str, int] = {}
        script = self._script

        class Moving:
            expect = router.expect

            def follower(self) -> Sampler:
                return Played(router.follower(), script, tokenizer, places)

        def sampler_for(version: PolicyVersion) -> Sampler:
            return Played(router.sampler(version), script, tokenizer, places)

        rows = [
            Question("", f"Question {i}: who wrote it? Box the answer.", str(i), "Ada", "benchmark")
            for i in range(4096)
        ]
        self.manager = RolloutManager(
            self._config, sampler_for, SleepingTools(), chat, {"train": rows}, None, Moving()
        )
        self._stack.push_async_callback(self.manager.close)
        return self

    async def __aexit__(self, *error: object) -> None:
        """End all episodes."""
        await self._stack.aclose()

    async def push(self, version: PolicyVersion) -> None:
        """As `weight_sync.Transaction` does, with nothing to send."""
        await asyncio.gather(*(e.pause(mode="abort", deadline_s=10) for e in self.engines))
        await asyncio.sleep(PUSH_S / TIME_SCALE)
        await self.set_version(version)
        await asyncio.gather(*(engine.resume(deadline_s=10) for engine in self.engines))

    async def set_version(self, version: PolicyVersion) -> None:
        """What the engines say that they serve."""
        for engine in self.engines:
            async with self._session.post(f"{engine.url}/version", data=str(version)) as reply:
                reply.raise_for_status()

    async def busy_s(self) -> float:
        """Seconds of decoding so far, mean over the engines."""
        total = 0.0
        for engine in self.engines:
            async with self._session.get(f"{engine.url}/load") as reply:
                total += (await reply.json())["busy_s"]
        return total / len(self.engines)

    async def run(self, train_s: float, num_warm_up: int, num_steps: int) -> Measured:
        """Collect, train (asleep) and push; what the steps after the warm-up took."""
        await self.set_version(0)
        start = busy = rollout_s = position = 0.0
        batches: list[RolloutBatch] = []
        for step in range(1, num_warm_up + num_steps + 1):
            if step == num_warm_up + 1:
                start, busy = time.monotonic(), await self.busy_s()
            asked = time.monotonic()
            batch = await self.manager.collect(step, step - 1, position=int(position))
            position = batch.next_position
            _check(batch)
            if step > num_warm_up:
                rollout_s += time.monotonic() - asked
                batches.append(batch)
            await asyncio.sleep(train_s)
            await self.push(step)
        seconds = time.monotonic() - start
        busy = await self.busy_s() - busy
        rows = [group.row_index for batch in batches for group in batch.groups]
        values = [batch.metrics for batch in batches]
        return Measured(
            step_s=seconds / num_steps,
            rollout_s=rollout_s / num_steps,
            episodes_per_s=num_steps * PROMPTS * SAMPLES / seconds,
            engines_busy=busy / seconds,
            tokens=self._script.num_tokens(rows) / num_steps,
            staleness_mean=sum(v.get("rollout/staleness_mean", 0.0) for v in values) / num_steps,
            staleness_max=max(v.get("rollout/staleness_max", 0.0) for v in values),
            refreshed_groups=sum(v.get("rollout/refreshed_groups", 0.0) for v in values),
        )


def _check(batch: RolloutBatch) -> None:
    """An episode that failed or left the script makes the measurement worthless."""
    for episode in (episode for group in batch.groups for episode in group.episodes):
        if episode.reward is None or episode.answer != "Ada":
            raise SystemExit(f"{episode.id} left the script: {episode.failure or episode.answer}")


async def measure(
    ports: Sequence[int], folder: Path, options: argparse.Namespace
) -> dict[str, Measured | float]:
    """Two synchronous steps to set the time of training by; then both runs."""
    in_turns = make_config(str(folder), {})
    lasting = make_config(
        str(folder), {"max_staleness": options.staleness, "on_stale": options.on_stale}
    )
    script = Script(options.seed, in_turns)
    async with PlayedRun(ports, script, in_turns, folder) as run:
        pilot = await run.run(0.0, 0, options.steps)
    train_s = pilot.rollout_s * (1 - ROLLOUT_SHARE) / ROLLOUT_SHARE
    async with PlayedRun(ports, script, in_turns, folder) as run:
        sync = await run.run(train_s, 0, options.steps)
    async with PlayedRun(ports, script, lasting, folder) as run:
        asynchronous = await run.run(train_s, 1 + options.staleness, 2 * options.steps)
    return {"train_s": train_s, "synchronous": sync, "asynchronous": asynchronous}


def engine_rates() -> Rates:
    """Of the benchmark's clock and tokens."""
    factor = TOKEN_SCALE / TIME_SCALE
    return Rates(SLOTS, BASE_S * factor, PER_SEQUENCE_S * factor)


@contextlib.contextmanager
def running_engines() -> Iterator[list[int]]:
    """Engines in a process of their own; yields their ports."""
    rates = engine_rates()
    text = json.dumps(
        {"slots": rates.slots, "base_s": rates.base_s, "per_sequence_s": rates.per_sequence_s}
    )
    command = [sys.executable, "-m", "benchmarks.decoding_engine", "--rates", text]
    command += ["--num", str(NUM_ENGINES)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the engines did not start; their error is above")
            yield json.loads(line)
        finally:
            process.terminate()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--staleness", type=int, default=4)
    parser.add_argument("--on-stale", choices=("wait", "refresh", "drop"), default="wait")
    parser.add_argument("--steps", type=int, default=6, help="synchronous ones; twice as many not")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="the last line is one object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, running_engines() as ports:
        write_model_folder(Path(name))
        found = asyncio.run(measure(ports, Path(name), options))
    sync, lasting, train_s = found["synchronous"], found["asynchronous"], found["train_s"]
    assert isinstance(sync, Measured) and isinstance(lasting, Measured)
    assert isinstance(train_s, float)
    trainer_s = train_s + PUSH_S / TIME_SCALE
    engine_s = (sync.tokens + lasting.tokens) / 2 * engine_rates().best_token_s / NUM_ENGINES
    speedup = lasting.episodes_per_s / sync.episodes_per_s
    bound = sync.step_s / max(trainer_s, engine_s)
    for label, run in (("synchronous", sync), (f"max_staleness={options.staleness}", lasting)):
        print(
            f"{label:<17} step {run.step_s:6.2f} s, of it {run.rollout_s:6.2f} s waiting for "
            f"episodes; {run.episodes_per_s:6.2f} episodes/s; engines busy {run.engines_busy:.0%}; "
            f"age of tokens {run.staleness_mean:.2f}, at most {run.staleness_max:.0f}; "
            f"{run.refreshed_groups:.0f} groups asked anew"
        )
    print(f"training {train_s:.2f} s; bounds of a step: trainer {trainer_s:.2f} s, ", end="")
    print(f"engines {engine_s:.2f} s; speedup {speedup:.2f}, at most {bound:.2f}")
    if options.json:
        result = {
            "speedup": speedup,
            "bound": bound,
            "trainer_bound_s": trainer_s,
            "engine_bound_s": engine_s,
            "synchronous_step_s": sync.step_s,
            "asynchronous_step_s": lasting.step_s,
            "staleness_mean": lasting.staleness_mean,
            "staleness_max": lasting.staleness_max,
            "refreshed_groups": lasting.refreshed_groups,
        }
        assert all(math.isfinite(value) for value in result.values())
        print(json.dumps(result))


if __name__ == "__main__":
    main()
