"""Proves that every pipeline stage sends its own tensors, and what a failure does on all senders.

An engine that dies is left out, whatever the senders were doing; any other failure ends the push.
On gloo, with receivers that take SGLang's steps to join and to receive, and are verified by
checksums of what they hold. Not proved: NCCL.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.helpers.dist import RankPool, free_port, run_ranks
from tests.helpers.sync_ranks import push_from_stages
from tests.helpers.tiny import make_tiny_model, tiny_config

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tp", [1, 2])
def test_engines_hold_every_stages_weights_bit_for_bit(
    ranks: RankPool, tmp_path: Path, tied: bool, tp: int
) -> None:
    config = tiny_config(make_tiny_model(tmp_path / "model", tied=tied), tp=tp, pp=2)
    results = ranks.run(push_from_stages, 2 * tp, config, tmp_path, free_port(), 60.0)
    lead = results[0]
    assert "error" not in lead, lead
    for pushed, exported in zip(lead["pushed"], lead["exported"], strict=True):
        assert set(pushed) == set(exported)
        assert ("lm_head.weight" in pushed) is not tied
        for name, tensor in exported.items():
            assert torch.equal(pushed[name], tensor), name
    assert not torch.equal(
        lead["pushed"][0]["model.norm.weight"], lead["pushed"][1]["model.norm.weight"]
    )
    for groups in lead["groups"]:
        assert groups == sorted(groups), "one stage after the other"
        assert set(groups) == {"0", "1"}, "each through a group of its own"
        assert groups.count("1") > 1, "in more than one bucket"
    assert any("layers.0." in name for name in lead["checked"])
    assert any("layers.1." in name for name in lead["checked"]), "checksums of the second stage too"


@pytest.mark.parametrize(
    ("failure", "lead_says", "other_says"),
    [
        (
            "refuses",
            r"bucket \d+ \(from .*\): .*fake://engine0: no more",
            "failed elsewhere: bucket",
        ),
        ("export", r"trainer rank 1: next: no memory for a scripted reason", "next: no memory"),
    ],
)
def test_a_failure_of_one_stage_ends_the_push_on_all_with_its_cause(
    tmp_path: Path, failure: str, lead_says: str, other_says: str
) -> None:
    config = tiny_config(make_tiny_model(tmp_path / "model", tied=False), pp=2)
    results = run_ranks(push_from_stages, 2, config, tmp_path, free_port(), 10.0, failure)
    assert_matches(results[0]["error"], lead_says)
    assert "stay paused" in results[0]["error"]
    assert_matches(results[1]["error"], other_says)
    assert max(result["seconds"] for result in results) < 40


def test_engines_that_die_are_left_out_and_the_others_get_every_stages_weights(
    ranks: RankPool, tmp_path: Path
) -> None:
    deaths = ("0", "1", "verify", "before")
    config = tiny_config(make_tiny_model(tmp_path / "model", tied=False), pp=2)
    results = ranks.run(push_from_stages, 2, config, tmp_path, free_port(), 30.0, "", deaths)
    assert "error" not in results[0], results[0]
    assert len(results[0]["pushed"]) == 1 + len(deaths) and results[0]["left"] == 1
    for pushed, exported in zip(results[0]["pushed"], results[0]["exported"], strict=True):
        assert set(pushed) == set(exported)
        for name, tensor in exported.items():
            assert torch.equal(pushed[name], tensor), name


def assert_matches(text: str, pattern: str) -> None:
    assert re.search(pattern, text), text
