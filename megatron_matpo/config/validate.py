"""Cross-section checks: allowed values, ranges, agents, layout, model folder, programs.

`check_values` looks at the configuration alone; `validate` adds what depends on the command and on
this machine's files. Nothing here starts a process or imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from megatron_matpo.config.gpus import check_gpu_name
from megatron_matpo.config.plan import check_placement, num_ports
from megatron_matpo.config.precision import FP8_RECIPES, PRECISIONS, check_precision
from megatron_matpo.config.reward import GRADERS
from megatron_matpo.config.root import Config
from megatron_matpo.config.validate_agents import check_agent, check_agent_limits, check_planner
from megatron_matpo.config.validate_algo import check_algo, warn_algo
from megatron_matpo.config.validate_async import check_async
from megatron_matpo.config.validate_data import warn_data
from megatron_matpo.config.validate_eval import check_eval
from megatron_matpo.config.validate_fleet import FLEET_AT_LEAST, FLEET_POSITIVE
from megatron_matpo.config.validate_lora import check_lora, check_lora_model
from megatron_matpo.config.validate_placement import check_shared
from megatron_matpo.config.validate_reward import check_judge_key, check_reward
from megatron_matpo.config.validate_sync import check_sync
from megatron_matpo.config.validate_tools import check_tool_machine, check_tools
from megatron_matpo.config.validate_train import TRAIN_AT_LEAST, TRAIN_CHOICES, check_train
from megatron_matpo.errors import ConfigError

Command = Literal["train", "sft", "eval"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "compat": ("corrected", "reference"),
    "precision": PRECISIONS,
    "fp8.recipe": ("auto", *FP8_RECIPES),
    "train.recompute": ("none", "selective", "full"),
    "rollout.prompts": ("rendered", "dataset"),
    "rollout.call_format": ("mcp_xml", "tool_call"),
    "rollout.router": ("builtin", "sglang"),
    "rollout.on_update": ("retract", "in_place"),
    "rollout.on_stale": ("wait", "refresh", "drop"),
    "reward.grader": GRADERS,
    "reward.judge.max_tokens_field": ("max_tokens", "max_completion_tokens"),
    "weight_sync.transport": ("auto", "broadcast", "ipc", "disk", "none"),
    "weight_sync.verify": ("full", "sample", "version"),
    "cluster.placement": ("disaggregated", "colocated"),
    "algo.baseline": ("group_mean", "leave_one_out"),
    "algo.aggregation": ("token", "trajectory", "episode"),
    "algo.kl_estimator": ("k1", "k2", "k3"),
    "algo.tis": ("off", "truncate", "mask"),
    "algo.old_logprobs": ("trainer", "engine"),
    "checkpoint.on_failure": ("stop", "warn"),
    "checkpoint.verify": ("full", "sizes"),
    "obs.wandb_mode": ("auto", "online", "offline", "disabled"),
    **TRAIN_CHOICES,
}

# Dotted path -> smallest allowed value.
_AT_LEAST: dict[str, float] = {
    "run.steps": 1,
    "run.seed": 0,
    "run.stop_grace_s": 0,
    "cluster.num_nodes": 1,
    "cluster.gpus_per_node": 0,
    "cluster.trainer_nodes": 0,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.virtual": 1,
    "parallel.context": 1,
    "parallel.expert": 1,
    "parallel.data": 1,
    "fp8.first_last_layers_bf16": 0,
    "data.prompts_per_step": 1,
    "data.samples_per_prompt": 1,
    "eval.every": 0,
    "eval.max_rows": 0,
    "eval.samples_per_row": 1,
    "eval.chunk_rows": 1,
    "eval.chunks_in_flight": 1,
    "eval.num_resamples": 100,
    "rollout.num_servers": 1,
    "rollout.tensor": 1,
    "rollout.max_staleness": 0,
    "rollout.stream_tokens": 0,
    "rollout.context_length": 1,
    "rollout.max_total_tokens": 0,
    "rollout.max_running_requests": 1,
    "rollout.max_concurrent_episodes": 1,
    "rollout.max_episode_retries": 0,
    "tools.result_max_chars": 1,
    "reward.accuracy_weight": 0,
    "reward.format_weight": 0,
    "reward.judge.max_concurrency": 1,
    "reward.judge.max_attempts": 1,
    "reward.judge.max_tokens": 1,
    "reward.judge.backoff_s": 0,
    "reward.judge.temperature": 0,
    "rollout.dynamic_sampling_max_rounds": 1,
    "algo.updates_per_step": 1,
    "lora.rank": 0,
    "algo.clip_low": 0,
    "algo.clip_high": 0,
    "algo.dual_clip": 0,
    "algo.kl_coef": 0,
    "algo.tis_cap": 1,
    "weight_sync.bucket_mb": 1,
    "checkpoint.every": 0,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 0,
    "obs.report_every": 0,
    "obs.trace_every": 0,
    "sft.steps": 1,
    "sft.batch_size": 1,
    "doctor.min_disk_mb_s": 0,
    "doctor.min_allreduce_gb_s": 0,
    "doctor.max_clock_skew_s": 0,
    **TRAIN_AT_LEAST,
    **FLEET_AT_LEAST,
}
# Dotted paths of values that must be greater than 0.
_POSITIVE = (
    "run.start_timeout_s",
    "run.save_timeout_s",
    "cluster.node_timeout_s",
    "rollout.temperature",
    "rollout.request_timeout_s",
    "rollout.episode_timeout_s",
    "rollout.step_timeout_s",
    "reward.judge.timeout_s",
    "reward.judge.deadline_s",
    "optim.eps",
    "train.timeout_s",
    "weight_sync.timeout_s",
    "checkpoint.timeout_s",
    "doctor.check_timeout_s",
    "doctor.nodes_timeout_s",
    "doctor.collective_timeout_s",
    "doctor.disk_test_mib",
    "doctor.allreduce_mib",
    *FLEET_POSITIVE,
)
# Dotted path -> (low, high); both allowed unless the low one is None (then 0 is excluded).
_BETWEEN: dict[str, tuple[float | None, float]] = {
    "rollout.top_p": (None, 1.0),
    "rollout.mem_fraction": (None, 1.0),
    "rollout.max_failed_frac": (0.0, 1.0),
    "rollout.over_sample": (0.0, 4.0),
    "eval.confidence": (0.5, 0.999),
    # torch's AdamW refuses exactly 1.
    "optim.beta1": (0.0, 0.999999),
    "optim.beta2": (0.0, 0.999999),
    "cluster.base_port": (0, 65535),
}
_LAST_PORT = 65535
_CHECKPOINT = re.compile(r"latest|whole|step_\d+")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_values(config: Config) -> list[str]:
    """Violations that the configuration alone shows, whatever command will read it."""
    problems = [
        *_check_choices(config),
        *_check_ranges(config),
        *_check_run(config),
        *_check_gpu(config),
        *_check_parallel(config),
        *check_precision(config),
    ]
    for name, agent in config.agents.items():
        problems += check_agent(name, agent)
    for check in (check_tools, check_reward, check_algo, check_eval, check_train, check_lora):
        problems += check(config)
    return problems


def collect_violations(config: Config, *, command: Command) -> list[str]:
    """Everything that can be known before anything starts (datasets: `launch.preflight`).

    One line for every violation: dotted path, value, what is allowed.
    """
    problems = [
        *check_values(config),
        *check_supported(config, command),
        *_check_model(config, command),
    ]
    if command == "train":
        problems += [*_check_train(config), *check_sync(config)]
    problems += _check_machines(config, command)
    if command == "eval" or (command == "train" and not config.rollout.replay):
        problems += [*check_planner(config), *check_agent_limits(config)]
        problems += _check_rollout(config)
        problems += [*_check_programs(config), *check_tool_machine(config)]
        problems += check_judge_key(config)
    return problems


def check_anywhere(config: Config, command: Command) -> list[str]:
    """What a run refuses wherever it is started: no file and no variable is looked at."""
    problems = [*check_supported(config, command), *_check_machines(config, command)]
    if command == "eval" or (command == "train" and not config.rollout.replay):
        problems += [*check_planner(config), *check_agent_limits(config)]
    return problems


def collect_warnings(config: Config, *, command: Command) -> list[str]:
    """Settings that are allowed but probably not meant."""
    warnings: list[str] = []
    if command == "train" and config.data.samples_per_prompt < 2:
        warnings.append(
            f"data.samples_per_prompt={config.data.samples_per_prompt}: a group of one episode has "
            "no baseline, every advantage is 0 and nothing is learnt; use 2 or more"
        )
    if command == "train" and config.algo.advantage_scale == 0:
        warnings.append("algo.advantage_scale=0: control experiment, nothing is learnt")
    if command == "train" and config.weight_sync.transport == "none":
        warnings.append("weight_sync.transport=none: control experiment, engines stay at version 0")
    if command == "train":
        warnings += [*warn_algo(config), *warn_data(config)]
    return warnings


def _value(config: Config, path: str) -> object:
    """The value at a dotted path of fixed sections."""
    value: object = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _check_choices(config: Config) -> Iterator[str]:
    for path, allowed in _CHOICES.items():
        value = _value(config, path)
        if value not in allowed:
            yield f"{path}={value}: expected one of {', '.join(allowed)}"


def _check_ranges(config: Config) -> Iterator[str]:
    for path, low in _AT_LEAST.items():
        value = _value(config, path)
        assert isinstance(value, int | float)
        if value < low:
            yield f"{path}={value}: must be at least {low:g}"
    for path in _POSITIVE:
        value = _value(config, path)
        assert isinstance(value, int | float)
        if value <= 0:
            yield f"{path}={value}: must be greater than 0"
    for path, (lower, high) in _BETWEEN.items():
        value = _value(config, path)
        assert isinstance(value, int | float)
        if value > high or (value <= 0 if lower is None else value < lower):
            bound = "greater than 0" if lower is None else f"at least {lower:g}"
            yield f"{path}={value}: must be {bound} and at most {high:g}"


def _check_run(config: Config) -> Iterator[str]:
    if not _RUN_NAME.fullmatch(config.run.name):
        yield (
            f"run.name={config.run.name}: a folder name of letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    if not _CHECKPOINT.fullmatch(config.checkpoint.load):
        yield f"checkpoint.load={config.checkpoint.load}: expected latest, whole or step_N"
    if 0 < config.algo.dual_clip <= 1:
        yield (
            f"algo.dual_clip={config.algo.dual_clip:g}: 0 (off) or more than 1; with 1 or less, "
            "tokens with a negative advantage lose their gradient"
        )
    if config.train.timeout_s < config.run.start_timeout_s:
        yield (
            f"train.timeout_s={config.train.timeout_s:g}: must be at least run.start_timeout_s="
            f"{config.run.start_timeout_s:g}: ranks wait in a collective while rank 0 waits "
            "for the engines"
        )
    needed = num_ports(config)
    if 0 < config.cluster.base_port > _LAST_PORT + 1 - needed:
        yield (
            f"cluster.base_port={config.cluster.base_port}: the run needs {needed} "
            f"consecutive ports, so at most {_LAST_PORT + 1 - needed}"
        )
    if config.rollout.top_k != -1 and config.rollout.top_k < 1:
        yield f"rollout.top_k={config.rollout.top_k}: -1 (off) or at least 1"


def _check_gpu(config: Config) -> Iterator[str]:
    if problem := check_gpu_name(config.cluster.gpu):
        yield problem


def check_supported(config: Config, command: Command) -> Iterator[str]:
    """What `matpo plan` can reckon with but no run can do."""
    if command == "train" and config.rollout.max_staleness > 0:
        yield from check_async(config)
    if command == "train" and not config.rollout.replay:
        yield from check_shared(config)


def _check_parallel(config: Config) -> Iterator[str]:
    parallel = config.parallel
    # Values below 1 have a line of their own.
    if parallel.stage_size % max(parallel.expert, 1):
        yield (
            f"parallel.expert={parallel.expert}: must divide tensor x context x data = "
            f"{parallel.stage_size}"
        )


def _check_rollout(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if 0 < rollout.max_total_tokens < rollout.context_length:
        yield (
            f"rollout.max_total_tokens={rollout.max_total_tokens}: must be 0 or at least "
            f"rollout.context_length={rollout.context_length}, or the longest trajectory never fits"
        )


def _check_train(config: Config) -> Iterator[str]:
    data, algo = config.data, config.algo
    episodes = data.prompts_per_step * data.samples_per_prompt
    if algo.updates_per_step > episodes:
        yield (
            f"algo.updates_per_step={algo.updates_per_step}: must be at most "
            f"data.prompts_per_step * data.samples_per_prompt = {episodes}"
        )
    if config.model.random_init:
        yield "model.random_init=true: only for `matpo sft`; train starts from the folder's weights"
    if config.reward.accuracy_weight + config.reward.format_weight <= 0:
        yield "reward.accuracy_weight=0: accuracy_weight + format_weight must be greater than 0"
    if config.rollout.replay and not Path(config.rollout.replay).is_dir():
        yield f"rollout.replay={config.rollout.replay}: no such folder"


def _check_machines(config: Config, command: Command) -> Iterator[str]:
    """Roles fit on the nodes."""
    has_engines = command == "eval" or (command == "train" and not config.rollout.replay)
    yield from check_placement(config, has_trainer=command != "eval", has_engines=has_engines)


def _check_model(config: Config, command: Command) -> Iterator[str]:
    """The model folder, and that the layout divides the model."""
    path = config.model.path
    if not path:
        yield "model.path=: expected the folder of a Hugging Face model"
        return
    folder = Path(path)
    if not folder.is_dir():
        yield f"model.path={path}: no such folder"
        return
    needs_weights = not (command == "sft" and config.model.random_init)
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if needs_weights and not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        yield f"model.path={path}: the folder lacks {', '.join(missing)}"
    if "config.json" not in missing:
        yield from _check_layout(config, command)


def _check_layout(config: Config, command: Command) -> Iterator[str]:
    from megatron_matpo.config.hf_model import HfModelConfig, check_layout

    try:
        hf = HfModelConfig.from_folder(config.model.path)
    except ConfigError as error:
        yield str(error)
        return
    if command != "eval":
        yield from check_layout(hf, config.parallel, on_gpu=config.cluster.device == "cuda")
        layers, stage = config.fp8.first_last_layers_bf16, hf.num_layers // config.parallel.pipeline
        if layers > stage:
            yield (
                f"fp8.first_last_layers_bf16={layers}: must be at most {stage}, the layers of a "
                "pipeline stage"
            )
        yield from check_lora_model(config, hf)
    if command != "sft" and config.rollout.context_length > hf.max_positions:
        yield (
            f"rollout.context_length={config.rollout.context_length}: {config.model.path} has "
            f"{hf.max_positions} positions (max_position_embeddings)"
        )


def _check_programs(config: Config) -> Iterator[str]:
    """Programs that the run starts with; those of tools have a check of their own."""
    python = config.rollout.python
    if not Path(python).is_file() or not os.access(python, os.X_OK):
        yield (
            f"rollout.python={python}: no such program; `make setup` builds the rollout "
            "environment, or name the Python of an environment that has SGLang"
        )
