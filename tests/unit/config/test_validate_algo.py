"""Proves what the section `algo` and `compat` refuse and warn of: path, value, what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.validate import check_values, collect_warnings


def changed(compat: str = "corrected", **algo: object) -> Config:
    config = Config()
    return replace(config, compat=compat, algo=replace(config.algo, **algo))  # type: ignore[arg-type]


def own(config: Config) -> list[str]:
    """Violations of this part; the rest of the bare configuration does not matter here."""
    return [text for text in check_values(config) if text.startswith(("algo.", "compat"))]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (changed(baseline="median"), "algo.baseline=median: expected one of group_mean, leave_one"),
        (changed(aggregation="seq"), "algo.aggregation=seq: expected one of token, trajectory, ep"),
        (changed(kl_estimator="k4"), "algo.kl_estimator=k4: expected one of k1, k2, k3"),
        (changed(tis="on"), "algo.tis=on: expected one of off, truncate, mask"),
        (changed(kl_coef=-0.1), "algo.kl_coef=-0.1: must be at least 0"),
        (changed(tis_cap=0.5), "algo.tis_cap=0.5: must be at least 1"),
        (changed(tis="mask", tis_cap=1.0), "algo.tis_cap=1: with algo.tis=mask every token"),
        (changed(tis="truncate", old_logprobs="engine"), "algo.tis=truncate: has nothing to corr"),
        (changed("original"), "compat=original: expected one of corrected, reference"),
        (changed("reference", baseline="leave_one_out"), "algo.baseline=leave_one_out: compat=ref"),
        (changed("reference", aggregation="episode"), "algo.aggregation=episode: compat=reference"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(config, expected):
    (problem,) = own(config)
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    "config",
    [
        changed(),
        changed("reference"),
        changed("reference", normalize_std=False, updates_per_step=2),
        changed(tis="truncate", tis_cap=1.0, kl_coef=0.01, aggregation="episode"),
        changed(baseline="leave_one_out", normalize_std=False, kl_coef=1, kl_estimator="k2"),
        changed(old_logprobs="engine", updates_per_step=4),
    ],
)
def test_allowed_without_a_word(config):
    assert own(config) == []
    assert collect_warnings(config, command="train") == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (changed(kl_coef=0.1, kl_estimator="k1"), "algo.kl_estimator=k1: as a loss its expected"),
        (changed(baseline="leave_one_out"), "algo.baseline=leave_one_out: with algo.normalize_std"),
        (changed("reference", tis="mask"), "compat=reference: the published runs had no KL"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_warned_of(config, expected):
    (warning,) = collect_warnings(config, command="train")
    assert warning.startswith(expected)
    assert collect_warnings(config, command="sft") == []
