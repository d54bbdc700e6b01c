"""Section `reward`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class JudgeConfig:
    """An LLM that grades answers, at any OpenAI-compatible endpoint."""

    base_url: str = "https://api.openai.com/v1"
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
    temperature: float = 0.0
    max_tokens: int = 16


@dataclass(frozen=True)
class RewardConfig:
    """Source of defaults: MATPO's scripts (0.9 / 0.1, no gate)."""

    accuracy_weight: float = 0.9
    format_weight: float = 0.1
    gate_format: bool = False
    """Format counts only when accuracy is exactly 1."""
    grader: str = "exact_match"
    """`exact_match` (normalised) | `f1` | `numeric` | `judge`."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
