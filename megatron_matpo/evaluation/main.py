"""The evaluation process: `python -m megatron_matpo.evaluation.main --run-dir RUN`.

Asks the manager for the episodes that `RUN/eval` lacks, in chunks of rows, keeps each chunk as it
comes, and writes `RUN/eval/results.md` and `RUN/eval/results.json` when all have come. The engines
serve the weights that they loaded themselves, version 0; nothing is pushed.

Per chunk, in this order: recordings (`SET/chunk_N.jsonl` for people, `SET/chunk_N.rollout` for
replay), then one append to `SET/results.jsonl`, which is what counts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path

from megatron_matpo import wire
from megatron_matpo.config import Config, load_resolved
from megatron_matpo.config.plan import Plan
from megatron_matpo.errors import MatpoError, RolloutError
from megatron_matpo.evaluation.asked import Chunk, FailureBound, open_sets
from megatron_matpo.evaluation.report import write_report
from megatron_matpo.evaluation.results import episode_results, number_samples
from megatron_matpo.obs.failure import record_failure
from megatron_matpo.obs.files import write_atomic
from megatron_matpo.obs.recorder import write_rollouts_jsonl
from megatron_matpo.obs.status import PhaseWriter
from megatron_matpo.rollout.client import ManagerClient
from megatron_matpo.rollout.engine_client import EngineClient
from megatron_matpo.types import RolloutBatch

ROLE = "evaluation"
VERSION = 0
"""What an engine calls the weights that it loaded itself."""
_INFO_TIMEOUT_S = 10.0


class Evaluation:
    """One start of an evaluation."""

    def __init__(self, config: Config, run_dir: Path, client: ManagerClient) -> None:
        """Read what earlier starts left.

        Raises:
            DataError: a set or a results file cannot be read.
        """
        self._config, self._run_dir, self._client = config, run_dir, client
        self._sets = open_sets(config, run_dir)
        self._status = PhaseWriter(run_dir, ROLE, 0)
        self._bound = FailureBound(
            config, num_wanted=sum(item.num_rows * item.num_samples for item in self._sets)
        )

    def run(self) -> None:
        """Ask for what is missing, then report.

        Raises:
            RolloutError: too many episodes failed for reasons outside the model; those that came
                are kept.
            DeadlineError: a chunk did not come in time.
        """
        chunks = iter(
            [chunk for item in self._sets for chunk in item.chunks(self._config.eval.chunk_rows)]
        )
        self._show()
        # Not a context manager: after a failure nobody waits for the chunks that still run.
        pool = ThreadPoolExecutor(self._config.eval.chunks_in_flight)
        running: dict[Future[bytes], Chunk] = {}
        while True:
            for chunk in islice(chunks, self._config.eval.chunks_in_flight - len(running)):
                running[pool.submit(self._ask, chunk)] = chunk
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                self._keep(running.pop(future), future.result())
        pool.shutdown()
        write_report(self._config, self._run_dir, self._sets)

    def _ask(self, chunk: Chunk) -> bytes:
        return self._client.collect(chunk.number, VERSION, chunk.set.name, asks=chunk.asks)

    def _keep(self, chunk: Chunk, data: bytes) -> None:
        what = f"chunk {chunk.number} of {chunk.set.name}"
        batch = number_samples(wire.decode(data, what), chunk.samples)
        if self._config.obs.record_rollouts:
            self._record(chunk, batch)
        results = episode_results(batch, chunk.set.hashes)
        chunk.set.file.append(results)
        self._show()
        self._bound.add(results)

    def _record(self, chunk: Chunk, batch: RolloutBatch) -> None:
        path = chunk.set.chunk_path(chunk.number)
        write_rollouts_jsonl(path.with_suffix(".jsonl"), batch, {})
        write_atomic(path.with_suffix(".rollout"), wire.encode(batch), durable=False)

    def _show(self) -> None:
        """Tell the supervisor how far each set is."""
        self._status.set("ask", sets={item.name: item.progress() for item in self._sets})


async def check_engines(config: Config, plan: Plan, key: str) -> None:
    """Return when every engine generates with the weights that it loaded itself.

    Raises:
        EngineError: one does not inside `run.start_timeout_s`, or serves another version.
    """

    async def check(url: str) -> None:
        engine = EngineClient(url, key)
        try:
            await engine.wait_ready(deadline_s=config.run.start_timeout_s)
            served = await engine.weight_version(deadline_s=_INFO_TIMEOUT_S)
        finally:
            await engine.close()
        if served != str(VERSION):
            raise RolloutError(
                f"{url}: serves weights of version {served!r} instead of {VERSION}, those that it "
                "loaded from model.path; rollout.engine_args must not set --weight-version"
            )

    await asyncio.gather(*(check(place.url) for place in plan.engines))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description="Evaluation process of one run.")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder with config.yaml")
    run_dir: Path = parser.parse_args(argv).run_dir
    PhaseWriter(run_dir, ROLE, 0).set("connect")
    try:
        config = load_resolved(str(run_dir / "config.yaml"))
        plan = Plan.from_json((run_dir / "plan.json").read_text(encoding="utf-8"))
        client = ManagerClient(
            plan.manager_url,
            os.environ["MATPO_RUN_TOKEN"],
            start_timeout_s=config.run.start_timeout_s,
            step_timeout_s=config.rollout.step_timeout_s,
        )
        evaluation = Evaluation(config, run_dir, client)
        client.wait_ready()
        asyncio.run(check_engines(config, plan, os.environ["MATPO_ENGINE_KEY"]))
        evaluation.run()
    except Exception as error:
        record_failure(run_dir, ROLE, 0, "evaluate", error, traceback.format_exc())
        traceback.print_exc()
        return error.exit_code if isinstance(error, MatpoError) else 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that still wait for the manager must not hold the process back.
    os._exit(code)
