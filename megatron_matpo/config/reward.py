"""Section `reward`."""

from __future__ import annotations

from dataclasses import dataclass, field

JUDGE = "judge"
GRADERS = ("exact_match", "f1", "numeric", "gaia", JUDGE)
"""Allowed values of `reward.grader`."""


@dataclass(frozen=True)
class JudgeConfig:
    """An LLM that grades answers, at any OpenAI-compatible endpoint."""

    base_url: str = "https://api.openai.com/v1"
    """Up to and without `/chat/completions`."""
    model: str = "gpt-4o-mini"
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; empty: the endpoint asks for none."""
    max_concurrency: int = 64
    """Requests in flight."""
    timeout_s: float = 60.0
    """Deadline of one request."""
    max_attempts: int = 4
    """Per verdict, transport errors, refusals and replies outside the verdict grammar included."""
    backoff_s: float = 1.0
    """Before the second attempt; doubled for each further one, with jitter."""
    deadline_s: float = 600.0
    """One verdict in all: waiting for a free place, attempts and pauses."""
    temperature: float = 0.0
    max_tokens: int = 16
    """Of the reply; a judge that thinks first needs far more."""
    max_tokens_field: str = "max_tokens"
    """What the endpoint calls that limit: `max_tokens`, or `max_completion_tokens` (OpenAI's
    reasoning models, which also want `temperature: 1`)."""


@dataclass(frozen=True)
class RewardConfig:
    """Source of defaults: MATPO's scripts (0.9 / 0.1, no gate)."""

    accuracy_weight: float = 0.9
    format_weight: float = 0.1
    worker_format_share: float = -1.0
    """How much of an episode's format score is the mean of its workers' scores, the rest being the
    planner's; without a worker it is the planner's alone. -1: the mean over all trajectories."""
    gate_format: bool = False
    """Format counts only when accuracy is exactly 1."""
    grader: str = "exact_match"
    """Offline: `exact_match` (normalised), `f1`, `numeric`, `gaia` (GAIA's own rule for numbers,
    lists and texts); or `judge`, the LLM below."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
