"""Proves that training on questions that results are reported for is warned about."""

from __future__ import annotations

import pytest

from megatron_matpo.config.data import DataConfig
from megatron_matpo.config.evaluation import EvalConfig
from megatron_matpo.config.root import Config
from megatron_matpo.config.validate_data import warn_data


@pytest.mark.parametrize(
    ("train", "sets", "expected"),
    [
        ("matpo_val_gaia_repeat_8", [], ["is an evaluation set of MATPO-data"]),
        ("data/single_agent_val_frames_repeat_2/x.parquet", [], ["is an evaluation set of MATPO"]),
        ("mine.parquet", ["mine.parquet"], ["is in eval.sets too"]),
        ("matpo_train_musique", ["matpo_val_gaia_repeat_8"], []),
        ("", [], []),
    ],
)
def test_training_on_evaluation_questions(train: str, sets: list[str], expected: list[str]) -> None:
    config = Config(data=DataConfig(train=train), eval=EvalConfig(sets=sets))
    found = list(warn_data(config))
    assert len(found) == len(expected)
    for line, part in zip(found, expected, strict=True):
        assert line.startswith(f"data.train={train}: {part}")
