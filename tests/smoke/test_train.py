"""Real steps with real servers: Megatron-Core TP=2, stock SGLang, the bundled MCP server.

Proves: the loop closes (weights pushed, versions counted), trainer and engine agree on log-probs,
everything a run promises is in its folder, no secret is, and nothing stays behind.
"""

import json
import os
import re
import stat

import pytest

from megatron_matpo.obs.metrics import REQUIRED
from megatron_matpo.obs.span_files import read_spans, traced_steps
from megatron_matpo.types import Role
from megatron_matpo.wire import decode
from tests.helpers.matpo import read_metrics, run_matpo, wait_until_gone
from tests.helpers.trace import check_trace
from tests.smoke.conftest import STEPS

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(600)]


def test_metrics_are_complete_and_the_policies_agree(live_run):
    lines = read_metrics(live_run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["policy_version"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line.keys() >= REQUIRED
        assert line["mismatch/abs_logprob"] < 1e-4
        assert line["mismatch/abs_logprob"] > 0, "two implementations never agree to the last bit"
        assert line["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
        # Two groups can both be of equal rewards, and teach nothing.
        assert (line["optim/grad_norm"] > 0) == (line["advantage/zero_groups"] < 1)
        assert line["tokens/trained"] > 0


def test_recorded_episodes_are_trees_of_both_roles(live_run):
    for step in range(1, STEPS + 1):
        batch = decode((live_run / "rollouts" / f"step_{step:06d}.rollout").read_bytes())
        assert batch.policy_version == step - 1
        episodes = [episode for group in batch.groups for episode in group.episodes]
        assert len(episodes) == 8
        for episode in episodes:
            assert episode.planner.role is Role.PLANNER
            for worker in episode.workers:
                assert worker.parent_id == episode.planner.id
            turns = [turn for item in episode.trajectories for turn in item.turns]
            versions = {span.version for turn in turns for span in turn.versions}
            assert versions <= {step - 1}
    assert any(episode.workers for episode in episodes)


def test_dump_for_people_has_the_original_fields_and_ours(live_run):
    lines = (live_run / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    wanted = {
        *("input", "output", "ground_truth", "score", "step", "tool_format_reward"),
        *("accuracy_reward", "combined_reward", "uid", "role", "parent_id", "trajectory_id"),
    }
    for line in lines:
        assert json.loads(line).keys() >= wanted


def test_the_exported_policy_loads(live_run):
    from safetensors.torch import load_file

    weights = load_file(live_run / "checkpoints" / "hf" / "model.safetensors")
    start = load_file("examples/smallworld/policy/model.safetensors")
    assert weights.keys() == start.keys()
    assert any(not weights[name].equal(start[name]) for name in weights)


def test_the_trace_agrees_with_the_metrics(live_run):
    assert traced_steps(live_run) == [1]
    files = {file.role: file.spans for file in read_spans(live_run, 1)}
    assert files.keys() == {"manager", "trainer-0", "trainer-1"}
    line, trainer = read_metrics(live_run)[0], files["trainer-0"]

    def seconds(spans, name):
        return sum(span.end_us - span.start_us for span in spans if span.name == name) / 1e6

    for phase in ("rollout", "train", "sync"):
        assert seconds(trainer, phase) == pytest.approx(line[f"time/{phase}_s"], abs=1e-5)
    (train,) = [span for span in trainer if span.name == "train"]
    for update in (span for span in trainer if span.name == "update"):
        assert train.start_us <= update.start_us <= update.end_us <= train.end_us
    received = [span for span in trainer if span.name == "receive"]
    assert {span.notes["engine"] for span in received} == {0}
    assert len(received) == sum(span.name == "bucket" for span in trainer) > 0
    assert {span.name for span in trainer} >= {"log", "rollout", "train", "sync"}

    batch = decode((live_run / "rollouts" / "step_000001.rollout").read_bytes())
    episodes = [episode for group in batch.groups for episode in group.episodes]
    spent = sum(episode.duration_s for episode in episodes)
    assert seconds(files["manager"], "episode") == pytest.approx(spent, abs=1e-4)
    (rollout,) = [span for span in trainer if span.name == "rollout"]
    for span in files["manager"]:  # two processes, one clock
        assert rollout.start_us - 5e4 < span.start_us <= span.end_us < rollout.end_us + 5e4


def test_the_trace_opens(live_run):
    done = run_matpo("trace", str(live_run))
    assert done.returncode == 0, done.stdout
    trace = json.loads((live_run / "trace" / "step_000001.json").read_text())
    names = check_trace(trace).values()
    assert {("trainer", "rank 0"), ("trainer", "rank 1"), ("episodes", "slot 7")} <= set(names)


def test_the_folder_is_whole_and_holds_no_secret(live_run):
    for name in ("config.yaml", "plan.json", "metrics.jsonl", "report.html"):
        assert (live_run / name).stat().st_size > 0
    for role in ("trainer-0", "trainer-1", "engine-0", "manager"):
        assert (live_run / "logs" / f"{role}.log").exists()
    assert (live_run / "checkpoints" / "latest").exists()
    for path in live_run.rglob("*"):
        if path.is_file() and path.suffix in (".log", ".json", ".yaml", ".jsonl", ".html"):
            text = path.read_text(errors="replace")
            # Secrets are 64 hexadecimal digits; nothing else that is written looks like that.
            assert re.search(r"\b[0-9a-f]{64}\b", text) is None, path
            assert "Bearer " not in text, path
        assert not (path.stat().st_mode & stat.S_IWOTH) or path.is_symlink(), path
    assert os.access(live_run, os.W_OK)


def test_nothing_is_left_running(live_run):
    assert wait_until_gone(live_run) == []


def test_servers_listen_on_loopback_only(live_run):
    """All of ours, torch's stores included. SGLang's own store cannot be told where to listen."""
    found = json.loads((live_run.parent / "listening.json").read_text())
    open_to_all = [line for line in found if not line.startswith("127.0.0.1 ")]
    assert [line for line in open_to_all if not line.startswith(":: sglang::scheduler")] == []
    for part in ("rollout.manager", "launch.torchrun", "launch.rank", "serve.py"):
        assert any(part in line for line in found), f"{part} was seen"
