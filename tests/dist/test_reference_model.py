"""The frozen initial model of the KL penalty, on every layout.

Proved on gloo and in float32: its log-probs are those that transformers gives for the folder,
before and after updates and after a resume; the swap leaves parameters and optimizer state bit for
bit as they were. Not proved: pinned memory and bf16, which need a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.dist import RankPool
from tests.helpers.learner_ranks import reference_story
from tests.helpers.tiny import make_batch, make_tiny_model, reference_logprobs, tiny_config

pytestmark = pytest.mark.dist

BATCHES = [make_batch((3, 11), 0), make_batch((2, 7), 1)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
def test_the_reference_stays_the_initial_model(ranks: RankPool, tmp_path: Path, sizes, tied):
    folder = make_tiny_model(tmp_path / "model", tied=tied)
    expected = reference_logprobs(folder, BATCHES)
    config = tiny_config(folder, **sizes)
    for story in ranks.run(reference_story, 2, config, BATCHES, tmp_path / "ck"):
        mine = expected[story["dp_rank"] :: sizes.get("dp", 1)]
        for name in ("reference", "reference later", "reference resumed"):
            for (actual, _), (want, _) in zip(story[name], mine, strict=True):
                torch.testing.assert_close(actual.double(), want, rtol=1e-5, atol=1e-5)
        assert story["kept"] and story["restored"]
        for (actual, _), (want, _), (again, _) in zip(
            story["own"], mine, story["own again"], strict=True
        ):
            assert float((actual - want).abs().max()) > 1e-3, "the policy has moved"
            assert torch.equal(actual, again)
        assert story["next"] == story["next without"]
