"""Proves that both examples with tools of their own train as their recipes stand.

Real engine, real tool servers, prompts rendered from the recipe.

That the policy learns within the recipe's 20 steps is measured in examples/workers/README.md.
"""

from __future__ import annotations

import pytest

from megatron_matpo.agents.grammar import CallOutcome
from megatron_matpo.types import Role
from megatron_matpo.wire import decode
from tests.helpers.matpo import ROOT, read_metrics, run_matpo, wait_until_gone

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("recipe", "worker", "server", "tool"),
    [
        ("example_calculator", "calculator", "python", "run_python"),
        ("example_sqlite", "analyst", "database", "query"),
    ],
)
def test_two_steps(tmp_path, recipe, worker, server, tool):
    small = ("run.steps=2", "data.prompts_per_step=4", "data.samples_per_prompt=4")
    path = str(ROOT / "recipes" / f"{recipe}.yaml")
    done = run_matpo("train", path, f"run.dir={tmp_path}", *small)
    assert done.returncode == 0, done.stdout
    run = tmp_path / recipe
    assert [line["policy_version"] for line in read_metrics(run)] == [1, 2]
    batches = [decode((run / "rollouts" / f"step_00000{n}.rollout").read_bytes()) for n in (1, 2)]
    episodes = [e for batch in batches for group in batch.groups for e in group.episodes]
    assert len(episodes) == 32

    trajectories = [item for episode in episodes for item in episode.trajectories]
    workers = [item for item in trajectories if item.role is Role.WORKER]
    assert len(workers) > 16 and {item.agent for item in workers} == {worker}
    prompts = {item.turns[0].text for item in trajectories if item.role is Role.PLANNER}
    assert all(f"## Server name: {worker}" in text for text in prompts), "rendered, not the row's"
    assert all(f"### Tool name: {tool}" in item.turns[0].text for item in workers)

    calls = [call for item in workers for call in item.calls if call.server == server]
    executed = [call for call in calls if call.outcome == CallOutcome.OK]
    assert len(executed) > 16 and all(call.tool == tool for call in executed)

    right = [episode for episode in episodes if episode.reward and episode.reward.accuracy == 1.0]
    # About a third at the start; one in eight would be a surprise of four standard deviations.
    assert len(right) > 4
    through_tools = [episode for episode in right if len(episode.trajectories) > 1]
    assert len(through_tools) * 2 > len(right), "answers come from workers, not from guesses"
    assert wait_until_gone(run) == []
