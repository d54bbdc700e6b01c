"""Section `rollout`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class HealthConfig:
    """How the manager judges engines (docs/fleet.md)."""

    probe_every_s: float = 10.0
    """Pause between two generation probes of an engine; one that did not answer is asked again
    after a second."""
    probe_timeout_s: float = 30.0
    """Deadline of a probe; a busy engine answers too."""
    max_failed_probes: int = 3
    """So many in a row, and the engine is dead: it is asked to be started anew."""
    max_failed_requests: int = 2
    """So many in a row, and the engine is suspect: it gets requests when no other can."""
    recovery_probes: int = 2
    """So many answered in a row, and a suspect engine is healthy again."""
    no_engine_timeout_s: float = 900.0
    """How long generations wait while no engine serves the present weights; then the step fails."""


@dataclass(frozen=True)
class RolloutConfig:
    """Engines and episodes."""

    planner: str = "main_agent"
    """Agent that answers the question; its `tools` decide between MATPO and single-agent mode."""
    prompts: str = "rendered"
    """System prompts: `rendered` from the recipe's agents and the live tool schemas, or the
    planner's taken from the `dataset` row; a mismatch between the two is reported."""
    call_format: str = "mcp_xml"
    """How the policy writes tool calls: `mcp_xml` (what MATPO checkpoints know) or
    `tool_call` (JSON in `<tool_call>`, native to Qwen and Hermes models)."""
    num_servers: int = 1
    tensor: int = 1
    """GPUs per engine."""
    max_staleness: int = 0
    """Age bound of trained tokens in policy versions; 0 is synchronous. With 1 or more the engines
    go on sampling while the trainer trains."""
    on_update: str = "retract"
    """What a weight push does to running generations, with `max_staleness`: `retract` (their cache
    is computed anew under the new weights) or `in_place` (they keep the cache of the old ones)."""
    on_stale: str = "wait"
    """For a group that would be too old for the next step: `wait` for it, `refresh` (its question
    is asked anew) or `drop`. The last two train on what ends soon, so on short episodes."""
    over_sample: float = 0.0
    """Begin this share of `data.prompts_per_step` more than a step takes, and take what is complete
    first. The rest is carried over, or without `max_staleness` ended and asked anew."""
    router: str = "builtin"
    """Who chooses the engine of a request: `builtin` (the manager; turns of a conversation go to
    one engine) or `sglang` (SGLang's own router, which the manager starts; docs/fleet.md)."""
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
    stream_tokens: int = 128
    """Engines report what they sample each time it is so many tokens, so that nothing more is lost
    with an engine; 0: when a turn is complete."""
    request_timeout_s: float = 600.0
    """Deadline of one generation."""
    episode_timeout_s: float = 1800.0
    """Wall-clock limit of one episode, its workers included."""
    step_timeout_s: float = 7200.0
    """Deadline of one step's rollout as the trainer waits for it."""
    max_episode_retries: int = 1
    """Fresh attempts of an episode that failed for reasons outside the model."""
    dynamic_sampling: bool = False
    """Ask further questions in place of groups whose rewards are all equal (DAPO)."""
    dynamic_sampling_max_rounds: int = 3
    """Rounds of replacements in one step; groups that are still uninformative are kept."""
    max_failed_frac: float = 0.25
    """Share of a step's episodes that may be left out; more stops the run."""
    health: HealthConfig = field(default_factory=HealthConfig)
    max_engine_restarts: int = 3
    """Restarts of one engine after it was ready, per start of the run. After that the run goes on
    without it, as long as another is left. 0: an engine that ends ends the run."""
    restart_backoff_s: float = 2.0
    """Before the first restart of an engine; doubles with each further one."""
    restart_backoff_max_s: float = 60.0
    replay: str = ""
    """Folder of recorded `step_N.rollout` files: train on them, start no engine and no manager."""
