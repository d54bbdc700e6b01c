"""Proves what is said about the judge's settings and dynamic sampling before anything starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.reward import RewardConfig
from megatron_matpo.config.tools import CacheConfig
from megatron_matpo.config.validate import check_values
from megatron_matpo.config.validate_reward import check_judge_key, check_reward


def judged(**settings: Any) -> Config:
    base = Config()
    judge = replace(base.reward.judge, **settings)
    return replace(base, reward=replace(base.reward, grader="judge", judge=judge))


@pytest.mark.parametrize(
    "base_url",
    ["https://api.openai.com/v1", "http://127.0.0.1:8000/v1/", "http://[::1]:8000", "http://judge"],
)
def test_good_settings_pass(base_url: str) -> None:
    assert list(check_reward(judged(base_url=base_url, api_key_env=""))) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"base_url": ""}, "reward.judge.base_url=: expected an address such as"),
        ({"base_url": "api.openai.com/v1"}, "expected an address such as"),
        ({"base_url": "ftp://x/v1"}, "expected an address such as"),
        ({"base_url": "http://x:99999/v1"}, "expected an address such as"),
        ({"base_url": "http:///v1"}, "expected an address such as"),
        ({"base_url": "http://x/v1?key=1"}, "expected an address such as"),
        ({"base_url": "http://x/v1/chat/completions"}, "leave /chat/completions out"),
        ({"model": " "}, "reward.judge.model=: expected the name of a model"),
        ({"deadline_s": 7200.0}, "must be less than rollout.step_timeout_s=7200"),
        ({"deadline_s": 30.0}, "reward.judge.deadline_s=30: must be at least"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], expected: str) -> None:
    (line,) = check_reward(judged(**settings))
    assert expected in line


@pytest.mark.parametrize(
    "settings", [{"api_key_env": "sk-secret-1"}, {"base_url": "https://u:sk-secret-1@x/v1"}]
)
def test_a_secret_in_the_recipe_is_refused_and_not_repeated(settings: dict[str, Any]) -> None:
    (line,) = check_reward(judged(**settings))
    assert "written to disk" in line and "sk-secret-1" not in line


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("max_concurrency", 0, "must be at least 1"),
        ("max_attempts", 0, "must be at least 1"),
        ("max_tokens", 0, "must be at least 1"),
        ("backoff_s", -1.0, "must be at least 0"),
        ("temperature", -0.1, "must be at least 0"),
        ("timeout_s", 0.0, "must be greater than 0"),
        ("max_tokens_field", "tokens", "expected one of max_tokens, max_completion_tokens"),
    ],
)
def test_ranges(field: str, value: Any, expected: str) -> None:
    (line,) = check_values(judged(**{field: value}))
    assert line.startswith(f"reward.judge.{field}=") and expected in line


@pytest.mark.parametrize(
    ("share", "compat", "expected"),
    [(1.5, "corrected", "=1.5: must be between 0 and 1"), (0.5, "reference", "compat=reference")],
)
def test_the_share_of_workers(share: float, compat: str, expected: str) -> None:
    config = replace(Config(), compat=compat, reward=RewardConfig(worker_format_share=share))
    (line,) = check_reward(config)
    assert line.startswith("reward.worker_format_share") and expected in line


def test_an_offline_grader_needs_no_good_judge() -> None:
    config = judged(base_url="")
    config = replace(config, reward=replace(config.reward, grader="gaia"))
    assert list(check_reward(config)) == list(check_judge_key(config)) == []


def test_the_key_must_be_there_unless_verdicts_are_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MATPO_TEST_KEY", raising=False)
    config = judged(api_key_env="MATPO_TEST_KEY")
    (line,) = check_judge_key(config)
    assert line.startswith("reward.judge.api_key_env=MATPO_TEST_KEY: the environment variable")
    replayed = replace(config, tools=replace(config.tools, cache=CacheConfig(mode="replay")))
    assert list(check_judge_key(replayed)) == []
    only_tools = CacheConfig(mode="replay", judge=False)
    (line,) = check_judge_key(replace(config, tools=replace(config.tools, cache=only_tools)))
    assert list(check_judge_key(judged(api_key_env=""))) == []
    monkeypatch.setenv("MATPO_TEST_KEY", "x")
    assert list(check_judge_key(config)) == []


def test_dynamic_sampling_needs_groups() -> None:
    base = Config()
    rollout = replace(base.rollout, dynamic_sampling=True)
    lone = replace(base, rollout=rollout, data=replace(base.data, samples_per_prompt=1))
    (line,) = check_reward(lone)
    assert line.startswith("rollout.dynamic_sampling=true: with data.samples_per_prompt=1")
    assert list(check_reward(replace(base, rollout=rollout))) == []
