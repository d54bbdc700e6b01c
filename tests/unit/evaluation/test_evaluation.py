"""The evaluation process against a real manager over HTTP, with parquet sets; the engine is a fake.

Proves what is asked, kept, asked again and given up. That a killed command resumes with a real
engine is proved by tests/smoke/test_eval.py.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_matpo import wire
from megatron_matpo.config.evaluation import EvalConfig
from megatron_matpo.config.root import Config
from megatron_matpo.config.run import ObsConfig
from megatron_matpo.data.dataset import read_questions
from megatron_matpo.errors import EngineRejected, RolloutError
from megatron_matpo.evaluation.main import Evaluation
from megatron_matpo.ports import free_ports
from megatron_matpo.rollout.client import ManagerClient
from megatron_matpo.rollout.collect import RolloutManager
from megatron_matpo.rollout.fleet import Fleet
from megatron_matpo.rollout.server import ManagerServer
from tests.helpers.rollouts import FakeEngine, FakeToolBox, make_chat, make_config

TOKEN = "s3cret"


def write_set(path: Path, names: list[str]) -> str:
    """A parquet file of MATPO-data's shape with these questions."""
    rows = [
        {
            "data_source": "test",
            "prompt": [
                {"role": "system", "content": "You plan."},
                {"role": "user", "content": f"Who is {name}? Box it."},
            ],
            "reward_model": {"ground_truth": name, "style": "rule"},
            "extra_info": {"question": f"Who is {name}?", "index": i},
        }
        for i, name in enumerate(names)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


class Policy:
    """Answers rightly, with the name in the question; fails for `down` names."""

    def __init__(self) -> None:
        self.down: set[str] = set()
        self.asked: Counter[str] = Counter()

    def __call__(self, conversation: str, turn: int, text: str) -> str | BaseException:
        name = text.split("Who is ")[1].split("?")[0]
        self.asked[name] += 1
        if name in self.down:
            return EngineRejected("no engine")
        return f"\\boxed{{{name}}}"


@contextmanager
def manager(config: Config, policy: Policy) -> Iterator[ManagerClient]:
    """A real manager on a port of its own, in a thread."""
    port, loop = free_ports("127.0.0.1", 1)[0], asyncio.new_event_loop()
    questions = {name: read_questions(path) for name, path in config.eval.named_sets.items()}
    server = ManagerServer(TOKEN)

    async def start() -> None:
        engine = FakeEngine(policy)
        tools, chat = FakeToolBox(), make_chat()
        collector = RolloutManager(config, lambda version: engine, tools, chat, questions)
        server.set_ready(collector, Fleet.unwatched(["http://a"]), "ready")
        await server.start("127.0.0.1", port)

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        url = f"http://127.0.0.1:{port}"
        yield ManagerClient(url, TOKEN, start_timeout_s=5, step_timeout_s=30)
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    base = make_config(str(tmp_path), max_episode_retries=0, max_failed_frac=0.5)
    section = EvalConfig(
        sets=[
            write_set(tmp_path / "one.parquet", ["Ada", "Bob", "Eve", "Ada"]),
            write_set(tmp_path / "two.parquet", ["Kim"]),
        ],
        samples_per_row=2,
        chunk_rows=2,
        num_resamples=100,
    )
    return replace(base, eval=section, obs=ObsConfig(record_rollouts=True))


@pytest.fixture
def policy() -> Policy:
    return Policy()


def evaluate(config: Config, policy: Policy) -> Path:
    """One start of the evaluation; returns `RUN/eval`."""
    run_dir = Path(config.run_dir)
    with manager(config, policy) as client:
        Evaluation(config, run_dir, client).run()
    return run_dir / "eval"


def report(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "results.json").read_text())["sets"]


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name / "results.jsonl").read_text().splitlines()]


def test_every_sample_of_every_row_is_asked_once(config, policy):
    folder = evaluate(config, policy)
    assert policy.asked == {"Ada": 4, "Bob": 2, "Eve": 2, "Kim": 2}
    sets = report(folder)
    assert list(sets) == ["one", "two"]
    assert sets["one"]["num_questions"] == 3, "rows 0 and 3 are copies"
    assert sets["one"]["measures"]["mean@4"]["value"] == 1.0
    assert sets["two"]["num_episodes"] == 2
    keys = [(line["row"], line["sample"]) for line in lines(folder, "one")]
    assert sorted(keys) == [(row, sample) for row in range(4) for sample in range(2)]
    assert "| one " in (folder / "results.md").read_text()


def test_rollouts_are_recorded_for_people_and_for_replay(config, policy):
    folder = evaluate(config, policy)
    chunks = sorted(file.name for file in (folder / "one").glob("chunk_*"))
    assert chunks == [
        f"chunk_{number:06d}.{suffix}" for number in (1, 2) for suffix in ("jsonl", "rollout")
    ]
    batch = wire.decode((folder / "one" / "chunk_000002.rollout").read_bytes())
    assert [group.row_index for group in batch.groups] == [2, 3]
    records = (folder / "one" / "chunk_000002.jsonl").read_text().splitlines()
    record = json.loads(records[0])
    assert record["advantage"] is None and record["question"] == "Who is Eve?"


def test_nothing_is_recorded_if_that_is_off(config, policy):
    folder = evaluate(replace(config, obs=ObsConfig(record_rollouts=False, trace_every=0)), policy)
    assert [file.name for file in (folder / "one").iterdir()] == ["results.jsonl"]


def test_the_same_command_again_asks_nothing(config, policy):
    evaluate(config, policy)
    policy.asked.clear()
    folder = evaluate(config, policy)
    assert not policy.asked
    assert report(folder)["one"]["num_episodes"] == 8


def test_failed_episodes_are_missing_and_asked_again(config, policy):
    policy.down = {"Bob"}
    folder = evaluate(config, policy)
    one = report(folder)["one"]
    assert (one["num_missing"], one["measures"]["mean@4"]["value"]) == (2, 1.0)
    assert "missing: 2 of 8 episodes" in (folder / "results.md").read_text()
    policy.down, policy.asked = set(), Counter()
    folder = evaluate(config, policy)
    assert policy.asked == {"Bob": 2}
    assert report(folder)["one"]["num_missing"] == 0
    assert (folder / "one" / "chunk_000003.jsonl").exists(), "numbers of chunks go on"


def test_more_samples_and_rows_are_added_to_what_is_there(config, policy):
    small = replace(config, eval=replace(config.eval, samples_per_row=1, max_rows=2))
    evaluate(small, policy)
    assert policy.asked == {"Ada": 1, "Bob": 1, "Kim": 1}
    policy.asked.clear()
    folder = evaluate(config, policy)
    assert policy.asked == {"Ada": 3, "Bob": 1, "Eve": 2, "Kim": 1}
    assert len(lines(folder, "one")) == 8
    folder = evaluate(small, policy)
    assert report(folder)["one"]["num_episodes"] == 2, "fewer are a part of what is there"


def test_results_of_changed_rows_are_not_taken_over(config, policy, tmp_path):
    evaluate(config, policy)
    policy.asked.clear()
    write_set(tmp_path / "one.parquet", ["Ada", "Zoe", "Eve", "Ada"])
    folder = evaluate(config, policy)
    assert policy.asked == {"Zoe": 2}
    assert report(folder)["one"]["num_questions"] == 3


def test_too_many_failures_end_it_and_keep_what_came(config, policy):
    config = replace(config, rollout=replace(config.rollout, max_failed_frac=0.0))
    policy.down = {"Bob"}
    config = replace(config, eval=replace(config.eval, chunks_in_flight=1))
    with pytest.raises(RolloutError, match=r"2 of 4 episodes.*max_failed_frac=0.*2 x engine_fail"):
        evaluate(config, policy)
    folder = Path(config.run_dir) / "eval"
    assert not (folder / "results.json").exists()
    assert [line["accuracy"] for line in lines(folder, "one")] == [1.0, 1.0, None, None]
    assert policy.asked == {"Ada": 2, "Bob": 2}, "later chunks were not asked"


def test_one_failure_among_the_last_few_does_not_end_a_large_evaluation(config, policy):
    policy.down = {"Kim"}
    evaluate(config, policy)
    policy.asked.clear()
    evaluate(config, policy)  # both of the two that are asked fail again
    assert policy.asked == {"Kim": 2}
