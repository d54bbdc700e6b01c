"""Proves what evaluation sets are called and which settings are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.evaluation import EvalConfig, set_name
from megatron_matpo.config.validate import check_values


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("matpo_val_gaia_repeat_8", "matpo_val_gaia_repeat_8"),
        ("data/gaia/train-00000-of-00001.parquet", "gaia"),
        ("data/gaia/train.parquet", "gaia"),
        ("data/gaia/", "gaia"),
        ("my set/v1.2.parquet", "v1.2"),
        ("a b/c d.parquet", "c_d"),
        ("trained.parquet", "trained"),
        ("train.parquet", "train"),
        ("..", ""),
    ],
)
def test_names_of_sets(entry, name):
    assert set_name(entry) == name


def problems(**fields) -> list[str]:
    base = Config()
    before = check_values(base)
    found = check_values(replace(base, eval=replace(base.eval, **fields)))
    return [problem for problem in found if problem not in before]


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        (
            {"sets": ["train.parquet"]},
            "eval.sets=train.parquet: its results would be",
        ),
        (
            {"sets": ["a/x", "b/x.parquet"]},
            "eval.sets=b/x.parquet: its results would be",
        ),
        ({"sets": [".."]}, "eval.sets='..': expected"),
        ({"every": -1}, "eval.every=-1: must be at least 0"),
        ({"samples_per_row": 0}, "eval.samples_per_row=0: must be at least 1"),
        ({"confidence": 1.0}, "eval.confidence=1.0: must be"),
        ({"num_resamples": 10}, "eval.num_resamples=10: must be at least 100"),
        ({"chunk_rows": 0}, "eval.chunk_rows=0: must be at least 1"),
    ],
)
def test_refused_settings(fields, start):
    (problem,) = problems(**fields)
    assert problem.startswith(start)


def test_sets_by_name_and_whether_training_stops_for_them():
    section = EvalConfig(sets=["d/b.parquet", "a"])
    assert section.named_sets == {"b": "d/b.parquet", "a": "a"}
    assert not section.is_wanted
    assert EvalConfig(every=1).is_wanted and EvalConfig(before_train=True).is_wanted
    assert problems(sets=section.sets) == []
