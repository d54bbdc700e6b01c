"""Sections `data`, `rollout` and `reward`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataConfig:
    """Questions, in the parquet schema of MATPO-data."""

    train: str = ""
    """Parquet file, or a folder of them."""
    eval: str = ""
    """Parquet file or folder; empty: no evaluation."""
    eval_every: int = 0
    """Steps between evaluations; 0: none."""
    eval_prompts: int = 64
    """Rows of `data.eval` that one evaluation asks, from the first."""
    prompts_per_step: int = 8
    samples_per_prompt: int = 8
    """Episodes per question: the GRPO group."""


@dataclass(frozen=True)
class RolloutConfig:
    """Engines and episodes."""

    planner: str = "main_agent"
    """Agent that answers the question; its `tools` decide between MATPO and single-agent mode."""
    num_servers: int = 1
    tensor: int = 1
    """GPUs per engine."""
    max_staleness: int = 0
    """Age bound of sampled tokens in policy versions; 0 is synchronous."""
    python: str = ".venv-rollout/bin/python"
    """Python of the rollout environment (SGLang's)."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    context_length: int = 40960
    """Tokens of one trajectory, prompt included."""
    max_total_tokens: int = 0
    """KV cache of one engine, tokens; 0 lets the engine decide."""
    mem_fraction: float = 0.8
    max_running_requests: int = 64
    max_concurrent_episodes: int = 1024
    engine_args: list[str] = field(default_factory=list[str])
    """Further arguments for SGLang's server, as it spells them."""
    request_timeout_s: float = 600.0
    """Deadline of one generation."""
    episode_timeout_s: float = 1800.0
    """Wall-clock limit of one episode, its workers included."""
    step_timeout_s: float = 7200.0
    """Deadline of one step's rollout as the trainer waits for it."""
    max_episode_retries: int = 1
    """Fresh attempts of an episode that failed for reasons outside the model."""
    max_failed_frac: float = 0.25
    """Share of a step's episodes that may be left out; more stops the run."""
    replay: str = ""
    """Folder of recorded `step_N.rollout` files: train on them, start no engine and no manager."""


@dataclass(frozen=True)
class RewardConfig:
    """Source of defaults: MATPO's scripts (0.9 / 0.1, no gate)."""

    accuracy_weight: float = 0.9
    format_weight: float = 0.1
    gate_format: bool = False
    """Format counts only when accuracy is exactly 1."""
    grader: str = "exact_match"
    """`exact_match` (normalised) | `f1` | `numeric`."""
