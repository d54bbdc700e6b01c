"""The quickstart's recipe in other forms, by override alone."""

import math

import pytest

from megatron_matpo.types import Role
from megatron_matpo.wire import decode
from tests.helpers.matpo import QUICKSTART, read_metrics, run_matpo

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(600)]
SINGLE_AGENT = (
    "rollout.planner=single_agent",
    "data.train=examples/smallworld/data/single_agent_train.parquet",
    "eval.sets=[examples/smallworld/data/single_agent_eval.parquet]",
)


def train(tmp_path, *overrides):
    small = ("run.steps=2", "data.prompts_per_step=2", "data.samples_per_prompt=4")
    done = run_matpo(
        "train", QUICKSTART, f"run.dir={tmp_path}", "run.name=variant", *small, *overrides
    )
    assert done.returncode == 0, done.stdout
    lines = [line for line in read_metrics(tmp_path / "variant") if line["step"] > 0]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["mismatch/abs_logprob"] < 1e-4
        assert line["sync/bytes"] > 0
        assert 0 < line["sync/deliver_s"] <= line["sync/pause_s"] <= line["time/sync_s"]
    data = (tmp_path / "variant" / "rollouts" / "step_000002.rollout").read_bytes()
    return lines, decode(data)


def test_pipeline_parallel(tmp_path):
    lines, _ = train(tmp_path, "parallel.pipeline=2")
    assert lines[-1]["policy_version"] == 2
    assert (tmp_path / "variant" / "logs" / "trainer-3.log").exists()


def test_two_servers_and_two_updates_with_evaluation(tmp_path):
    overrides = ["rollout.num_servers=2", "algo.updates_per_step=2", "eval.every=2"]
    overrides += ["eval.max_rows=4", "eval.samples_per_row=2", "eval.before_train=true"]
    lines, _ = train(tmp_path, *overrides)
    assert (tmp_path / "variant" / "logs" / "engine-1.log").exists()
    assert [line["optim/updates"] for line in lines] == [2, 2]
    assert lines[1]["eval/matpo_eval/episodes"] == 8
    assert 0 <= lines[1]["eval/matpo_eval/maj@2"] <= lines[1]["eval/matpo_eval/best@2"] <= 1
    assert not any(name.startswith("eval/") for name in lines[0])
    start = read_metrics(tmp_path / "variant")[0]
    assert start["step"] == 0 and "eval/matpo_eval/mean@2" in start
    recorded = sorted(file.name for file in (tmp_path / "variant" / "eval").iterdir())
    assert recorded == ["step_000000_matpo_eval.jsonl", "step_000002_matpo_eval.jsonl"]


def test_two_servers_behind_sglangs_router(tmp_path):
    lines, batch = train(tmp_path, "rollout.num_servers=2", "rollout.router=sglang")
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    turns = [
        turn
        for group in batch.groups
        for episode in group.episodes
        for trajectory in episode.trajectories
        for turn in trajectory.turns
    ]
    assert {span.version for turn in turns for span in turn.versions} == {1}
    log = (tmp_path / "variant" / "logs" / "manager.log").read_text()
    assert "SGLang's router sends to engine-0, engine-1" in log
    assert (tmp_path / "variant" / "logs" / "router.log").exists()


def test_single_agent(tmp_path):
    _, batch = train(tmp_path, *SINGLE_AGENT)
    trajectories = [t for g in batch.groups for e in g.episodes for t in e.trajectories]
    assert {t.role for t in trajectories} == {Role.PLANNER}
    assert {t.agent for t in trajectories} == {"single_agent"}
    assert any(call.server == "search_and_scrape_webpage" for t in trajectories for call in t.calls)
