"""Rates: what machines can do, from a small YAML file, and the engine that follows from them.

An engine is given either as measured seconds (`engine`, which hold for one model) or as a roofline
(`roofline`: peaks of a GPU and the shares of them that are reached), from which the model's shape
makes seconds. Files that come with the package lie in `rates/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from megatron_matpo.config import Config
from megatron_matpo.config.flops import Shape
from megatron_matpo.config.gpus import Gpu
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.schema import check_mapping
from megatron_matpo.errors import ConfigError
from megatron_matpo.planning.engines import kv_bytes_per_token
from megatron_matpo.simulation.engine import EngineRates

SHIPPED = Path(__file__).parent / "rates"
_HALF = 2
"""Bytes of a weight in an engine on a GPU."""
Section = TypeVar("Section")


@dataclass(frozen=True)
class MeasuredEngine:
    """Seconds of one engine, with one model."""

    step_s: float = 0.0
    """Of a decode step, beside what its sequences add."""
    per_sequence_s: float = 0.0
    per_context_token_s: float = 0.0
    prefill_s: float = 0.0
    """Of a prefill, beside what its tokens add."""
    prefill_token_s: float = 0.0
    concurrency: list[int] = field(default_factory=list[int])
    """A table in place of `step_s` and `per_sequence_s`: numbers of sequences ..."""
    tokens_per_s: list[float] = field(default_factory=list[float])
    """... and what the engine samples with so many, all together."""
    request_s: float = 0.0
    """Before every generation, outside of the engine."""
    tensor: int = 1
    """`rollout.tensor` that it was measured with."""


@dataclass(frozen=True)
class Roofline:
    """Of one GPU of an engine; peaks of products are those of `config/gpus.py`."""

    hbm_gb_s: float = 0.0
    hbm_frac: float = 0.0
    """Share of it that decoding reaches."""
    flops_frac: float = 0.0
    """Share of the bf16 peak that products reach."""
    step_s: float = 0.0
    """Of a decode step, beside reading and products: scheduler, launches, sampling."""
    allreduce_s: float = 0.0
    """Of one all-reduce of a decode step; two per layer with `rollout.tensor` above 1."""
    prefill_s: float = 0.0
    request_s: float = 0.0


@dataclass(frozen=True)
class CacheRates:
    """What engines remember."""

    prefix_hit: float = 1.0
    prompt_hit: float = 0.0


@dataclass(frozen=True)
class TrainRates:
    """The trainer."""

    mfu: float = 0.0
    """Share of the GPU's peak, operations of recomputation counted, without bubble and imbalance;
    collectives inside of a micro-batch included."""
    mfu_fp8: float = 0.0
    """The same with fp8 products, of the fp8 peak."""
    tflops_per_device: float = 0.0
    """In place of `mfu`, where there is no peak."""
    micro_batch_s: float = 0.0
    """Beside its operations."""
    update_s: float = 0.0
    """Of an update, beside its micro-batches and the network."""
    network_gb_s: float = 0.0
    """Of one rank, for gradients and parameters; 0: not counted."""
    step_s: float = 0.0
    """Of a step, outside of all phases."""


@dataclass(frozen=True)
class MoveRates:
    """Bytes that are moved: weight push, checkpoint, switch of colocated roles."""

    push_gb_s: float = 0.0
    """The whole model to all engines."""
    push_s: float = 0.0
    """Of a push, beside its bytes."""
    colocated_push_gb_s: float = 0.0
    host_gb_s: float = 0.0
    """One GPU to its host or back; 0: not counted."""
    switch_s: float = 0.0
    """Of handing all GPUs over, one way, beside the bytes."""
    write_gb_s: float = 0.0
    """A checkpoint to its file system, all ranks together; 0: not counted."""


@dataclass(frozen=True)
class Rates:
    """A file."""

    source: str = ""
    """Where the numbers come from; printed."""
    gpu: str = ""
    """As `cluster.gpu`; empty: a CPU."""
    model: str = ""
    """End of the `model.path` that `engine` was measured with."""
    engine: MeasuredEngine = field(default_factory=MeasuredEngine)
    roofline: Roofline = field(default_factory=Roofline)
    cache: CacheRates = field(default_factory=CacheRates)
    train: TrainRates = field(default_factory=TrainRates)
    move: MoveRates = field(default_factory=MoveRates)


def read_section(cls: type[Section], path: str, option: str) -> Section:
    """A YAML file as the dataclass `cls`; every mistake is named.

    Raises:
        ConfigError: no such file, no mapping, unknown keys, wrong types, or negative numbers.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{option}={path}: expected a YAML file ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{option}={path}: expected a mapping")
    clean, problems = check_mapping(cls, raw, "")
    if not problems:
        problems = [
            f"{name}={value}: must not be negative" for name, value in _numbers(clean) if value < 0
        ]
    if problems:
        raise ConfigError("\n".join(f"{option}={path}: {problem}" for problem in problems))
    return _build(cls, clean)


def _numbers(raw: dict[str, Any], path: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in raw.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{path}{key}.")
        elif isinstance(value, list):
            found += [(f"{path}{key}", float(item)) for item in value]
        elif isinstance(value, int | float):
            found.append((f"{path}{key}", value))
    return found


def _build(cls: type[Section], clean: dict[str, Any]) -> Section:
    hints = get_type_hints(cls)
    values = {
        key: _build(hints[key], value or {}) if is_dataclass(hints[key]) else value
        for key, value in clean.items()
    }
    return cls(**values)


def _read_rates(path: str, option: str) -> Rates:
    rates = read_section(Rates, path, option)
    shares = {
        "roofline.hbm_frac": rates.roofline.hbm_frac,
        "roofline.flops_frac": rates.roofline.flops_frac,
        "cache.prefix_hit": rates.cache.prefix_hit,
        "cache.prompt_hit": rates.cache.prompt_hit,
        "train.mfu": rates.train.mfu,
        "train.mfu_fp8": rates.train.mfu_fp8,
    }
    problems = [
        f"{option}={path}: {key}={value:g}: a share, at most 1"
        for key, value in shares.items()
        if value > 1
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return rates


def choose_rates(config: Config, path: str) -> Rates:
    """`--rates FILE`, or the shipped file for the recipe's GPU.

    Raises:
        ConfigError: there is none, or the file is not for this GPU or model.
    """
    if path:
        return check_gpu(_read_rates(path, "--rates"), config, f"--rates={path}")
    shipped = [_read_rates(str(file), "rates") for file in sorted(SHIPPED.glob("*.yaml"))]
    fitting = [rates for rates in shipped if _is_for(rates, config)]
    if fitting:
        return fitting[0]
    known = ", ".join(sorted({rates.gpu for rates in shipped if rates.gpu}))
    if config.cluster.device == "cpu":
        raise ConfigError(
            f"no rates of {config.model.path} on a CPU: simulate from a small run of it "
            "(--from-run RUN_DIR), or name a file (--rates FILE)"
        )
    name = config.cluster.gpu or "(none)"
    raise ConfigError(
        f"cluster.gpu={name}: no rates of it come with the package (there are: {known}); name one "
        "of them, or a file (--rates FILE), or a run (--from-run RUN_DIR)"
    )


def check_gpu(rates: Rates, config: Config, option: str) -> Rates:
    """The rates, if they are of the recipe's GPU.

    Raises:
        ConfigError: they are not.
    """
    if rates.gpu != config.cluster.gpu:
        raise ConfigError(
            f"{option}: rates of {rates.gpu or 'a CPU'}, but "
            f"cluster.gpu={config.cluster.gpu or '(none)'}"
        )
    return rates


def _is_for(rates: Rates, config: Config) -> bool:
    if rates.gpu != config.cluster.gpu:
        return False
    if rates.gpu:
        return True
    return config.cluster.device == "cpu" and is_same_model(rates, config)


def is_same_model(rates: Rates, config: Config) -> bool:
    """Whether measured seconds hold for the recipe's model."""
    return not rates.model or Path(config.model.path).as_posix().endswith(rates.model)


def engine_rates(
    rates: Rates, config: Config, hf: HfModelConfig, gpu: Gpu | None, num_parameters: int
) -> EngineRates:
    """Seconds of one engine of the recipe.

    Raises:
        ConfigError: the file has neither a usable `engine` nor a usable `roofline`.
    """
    measured = rates.engine
    if measured.tokens_per_s or measured.step_s or measured.per_sequence_s:
        if not is_same_model(rates, config):
            raise ConfigError(
                f"rates: engine was measured with {rates.model}, not with "
                f"model.path={config.model.path}"
            )
        if measured.tensor != config.rollout.tensor:
            raise ConfigError(
                f"rates: engine was measured with rollout.tensor={measured.tensor}, the recipe "
                f"has {config.rollout.tensor}"
            )
        return EngineRates(
            overhead_s=measured.step_s,
            per_sequence_s=measured.per_sequence_s,
            table=_table(measured),
            kv_s=measured.per_context_token_s,
            prefill_base_s=measured.prefill_s,
            prefill_token_s=measured.prefill_token_s,
            request_s=measured.request_s,
        )
    roofline = rates.roofline
    if gpu is None or min(roofline.hbm_gb_s, roofline.hbm_frac, roofline.flops_frac) <= 0:
        raise ConfigError(
            "rates: expected engine.step_s or engine.tokens_per_s, or roofline.hbm_gb_s, hbm_frac "
            "and flops_frac of a GPU"
        )
    return _from_roofline(roofline, hf, gpu, num_parameters, config.rollout.tensor)


def _table(measured: MeasuredEngine) -> tuple[tuple[int, float], ...]:
    """(sequences, seconds of a step), by sequences."""
    sizes, speeds = measured.concurrency, measured.tokens_per_s
    if len(sizes) != len(speeds) or any(size < 1 for size in sizes) or any(s <= 0 for s in speeds):
        raise ConfigError(
            "rates: engine.concurrency and engine.tokens_per_s: expected equally many positive "
            "numbers"
        )
    return tuple(sorted((size, size / speed) for size, speed in zip(sizes, speeds, strict=True)))


def _from_roofline(
    roofline: Roofline, hf: HfModelConfig, gpu: Gpu, num_parameters: int, tensor: int
) -> EngineRates:
    shape = Shape.of(hf)
    hbm = roofline.hbm_gb_s * 1e9 * roofline.hbm_frac
    flops = gpu.bf16_tflops * 1e12 * roofline.flops_frac * tensor
    expert_parameters = 3 * hf.hidden_size * shape.expert_size * shape.num_experts
    experts = expert_parameters * shape.num_expert_layers
    # The input embedding is looked up, not read.
    looked_up = 0 if hf.tie_word_embeddings else hf.vocab_size * hf.hidden_size
    allreduces = 2 * hf.num_layers * roofline.allreduce_s if tensor > 1 else 0.0
    return EngineRates(
        overhead_s=roofline.step_s + allreduces,
        weights_s=(num_parameters - experts - looked_up) * _HALF / hbm / tensor,
        experts_s=experts * _HALF / hbm / tensor,
        expert_share=shape.experts_per_token / shape.num_experts if shape.num_experts else 1.0,
        kv_s=kv_bytes_per_token(hf, tensor) / hbm,
        compute_s=(shape.per_token + 2 * hf.hidden_size * hf.vocab_size) / flops,
        prefill_base_s=roofline.prefill_s,
        prefill_token_s=shape.per_token / flops,
        prefill_pair_s=shape.per_pair / flops,
        request_s=roofline.request_s,
    )


def as_yaml(rates: Rates) -> str:
    """A file that `read_section` reads back; what is 0 or empty is left out."""
    return yaml.safe_dump(_plain(rates), sort_keys=False)


def _plain(section: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            value = _plain(value)
        elif isinstance(value, float):
            value = float(f"{value:.4g}")
        if value not in (0, 0.0, "", [], {}):
            found[item.name] = value
    return found
