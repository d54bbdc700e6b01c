"""A bad number in one replica's batch: named, written down, and skipped or stopped by all ranks.

Proved on gloo ranks: every rank decides the same; parameters do not move in a refused update and do
in the next good one; the dump holds the batch bit for bit, with the log-probs that transformers
gives. What cannot be named by token: `tests/dist/test_update_semantics.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_matpo.megatron.nonfinite import read_dump
from megatron_matpo.types import RolloutBatch, TurnKind
from tests.helpers.dist import RankPool
from tests.helpers.episodes import make_batch as make_episodes
from tests.helpers.learner_ranks import for_tiny_model, refused, with_algo
from tests.helpers.tiny import make_tiny_model, reference_logprobs, tiny_config

pytestmark = pytest.mark.dist

GOOD = for_tiny_model(make_episodes(0, num_groups=3))


def with_nan(batch: RolloutBatch) -> tuple[RolloutBatch, str]:
    """`batch` where the engine reported one NaN, and the id of that worker."""
    group = next(g for g in batch.groups if any(e.reward and e.workers for e in g.episodes))
    episode = next(e for e in group.episodes if e.reward and e.workers)
    worker = episode.workers[0]
    turns = list(worker.turns)
    index = next(i for i, turn in enumerate(turns) if turn.kind is TurnKind.MODEL)
    turns[index] = replace(turns[index], logprobs=(math.nan, *turns[index].logprobs[1:]))
    workers = (replace(worker, turns=tuple(turns)), *episode.workers[1:])
    episodes = [replace(e, workers=workers) if e is episode else e for e in group.episodes]
    groups = [replace(g, episodes=tuple(episodes)) if g is group else g for g in batch.groups]
    return replace(batch, groups=tuple(groups)), worker.id


BAD, CULPRIT = with_nan(GOOD)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("refused") / "model", tied=False)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("layout", [{"dp": 2}, {"pp": 2}], ids=str)
def test_skipped_until_too_many_in_a_row(ranks: RankPool, model_folder, tmp_path, layout):
    config = tiny_config(
        model_folder,
        on_non_finite="skip",
        max_skipped_updates=2,
        micro_batch_tokens=100,
        **layout,
    )
    config = with_algo(config, tis="truncate", tis_cap=1.5)
    answers = ranks.run(
        refused, 2, config, [BAD, GOOD, BAD, BAD, BAD, GOOD], tmp_path, timeout_s=240
    )
    for steps in answers:
        assert [step.get("made") for step in steps] == [0, 1, 0, 0, None]
        counts = [step["metrics"]["optim/skipped_updates"] for step in steps[:4]]
        assert counts == [1, 0, 1, 1]
        assert math.isnan(steps[0]["metrics"]["loss/policy"])
        assert math.isfinite(steps[1]["metrics"]["loss/policy"])
        error = steps[4]["error"]
        assert error.startswith("step 5, update 0: loss nan at update 4; nothing was changed; ")
        assert (
            f"not finite in trajectory {CULPRIT} (gradient, old_logprobs, rollout_logprobs); "
            in error
        )
        assert "train.max_skipped_updates=2 updates before it were skipped in a row" in error
    weights = [step["weights"] for step in answers[0]]
    assert not equal(weights[0], weights[1])
    for later in weights[2:]:
        assert equal(weights[1], later)

    dumps = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("nonfinite/*/*"))
    assert dumps == [Path(f"nonfinite/step_00000{n}/update_0") for n in (1, 3, 4, 5)]
    dump = read_dump(tmp_path / dumps[0])
    assert dump.about["culprits"] == {CULPRIT: ["gradient", "old_logprobs", "rollout_logprobs"]}
    assert (dump.about["step"], dump.about["reason"]) == (1, "loss nan at update 0")
    assert len(dump.replicas) == layout.get("dp", 1)
    seen = [item for replica in dump.replicas for item in replica]
    bad = [item for item in seen if torch.isnan(item.batch.rollout_logprobs).any()]
    assert len(bad) == 1 and CULPRIT in bad[0].batch.sample_ids
    assert int(torch.isnan(bad[0].batch.rollout_logprobs).sum()) == 1
    expected = reference_logprobs(model_folder, [item.batch for item in seen])
    for item, (logprobs, _) in zip(seen, expected, strict=True):
        torch.testing.assert_close(item.logprobs.double(), logprobs, rtol=1e-5, atol=1e-5)
        assert item.gradient is not None and item.gradient.shape == item.logprobs.shape


def test_stopped_by_all(ranks: RankPool, model_folder, tmp_path):
    config = with_algo(tiny_config(model_folder, dp=2), tis="truncate")
    for steps in ranks.run(refused, 2, config, [BAD, GOOD], tmp_path, timeout_s=240):
        (step,) = steps
        assert f"trajectory {CULPRIT} (gradient, old_logprobs, rollout_logprobs)" in step["error"]
        assert f"its batch is in {tmp_path}/nonfinite/step_000001/update_0" in step["error"]
        assert step["error"].endswith("train.on_non_finite=skip goes on without it")
