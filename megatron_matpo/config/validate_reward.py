"""Violations in the section `reward`, and of dynamic sampling, which is about rewards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from megatron_matpo.config.reward import JUDGE, JudgeConfig
from megatron_matpo.config.root import Config

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_reward(config: Config) -> Iterator[str]:
    """Violations that the configuration alone shows."""
    if config.rollout.dynamic_sampling and config.data.samples_per_prompt < 2:
        yield (
            "rollout.dynamic_sampling=true: with data.samples_per_prompt="
            f"{config.data.samples_per_prompt} no group can be informative; use 2 or more"
        )
    share = config.reward.worker_format_share
    if share > 1.0 or (share < 0 and share != -1.0):
        yield f"reward.worker_format_share={share:g}: must be between 0 and 1, or -1"
    if share != -1.0 and config.compat == "reference":
        yield (
            "reward.worker_format_share: compat=reference has the original's own share, one half; "
            "leave one of the two out"
        )
    if config.reward.grader == JUDGE:
        yield from _check_judge(config.reward.judge)
        deadline_s, limit_s = config.reward.judge.deadline_s, config.rollout.step_timeout_s
        if deadline_s >= limit_s:
            yield (
                f"reward.judge.deadline_s={deadline_s:g}: must be less than "
                f"rollout.step_timeout_s={limit_s:g}, or an outage of the judge looks like a "
                "rollout that never ends"
            )


def _check_judge(judge: JudgeConfig) -> Iterator[str]:
    path = "reward.judge"
    if not judge.model.strip():
        yield f"{path}.model=: expected the name of a model"
    if judge.api_key_env and not _VARIABLE.fullmatch(judge.api_key_env):
        # The value is left out on purpose: it may be the key itself.
        yield (
            f"{path}.api_key_env: expected the name of an environment variable, such as "
            "OPENAI_API_KEY, not the key; the configuration is written to disk"
        )
    if judge.deadline_s < judge.timeout_s:
        yield (
            f"{path}.deadline_s={judge.deadline_s:g}: must be at least {path}.timeout_s="
            f"{judge.timeout_s:g}, the deadline of one request"
        )
    try:
        url = urlsplit(judge.base_url)
        is_whole = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_whole, url = False, urlsplit("")
    if "@" in url.netloc:
        yield (
            f"{path}.base_url: must not hold a user or password; the configuration is written to "
            f"disk; export the key and name it in {path}.api_key_env"
        )
    elif not is_whole or url.query or url.fragment:
        yield (
            f"{path}.base_url={judge.base_url}: expected an address such as "
            "https://api.openai.com/v1 or http://127.0.0.1:8000/v1"
        )
    elif url.path.rstrip("/").endswith("/chat/completions"):
        yield f"{path}.base_url={judge.base_url}: leave /chat/completions out, it is added"


def check_judge_key(config: Config) -> Iterator[str]:
    """Whether this machine has the judge's key; a replayed cache needs none."""
    name = config.reward.judge.api_key_env
    is_replayed = config.tools.cache.mode == "replay" and config.tools.cache.judge
    if config.reward.grader == JUDGE and name and not is_replayed and not os.environ.get(name):
        yield (
            f"reward.judge.api_key_env={name}: the environment variable is not set; export it, or "
            "leave the setting empty if the endpoint asks for no key"
        )
