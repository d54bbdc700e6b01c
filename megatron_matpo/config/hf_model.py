"""The shape of a Hugging Face model folder, and which trainer layouts it allows. Torch-free.

Invariants:

* only architectures whose every parameter `megatron.families` knows are accepted;
* settings of `config.json` that would change the mathematics and that the trainer does not
  implement are refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from megatron_matpo.config.hf_families import (
    FAMILIES,
    SUPPORTED_ARCHITECTURES,
    Family,
    MoeShape,
    family_problems,
    num_experts,
    read_moe,
    read_window,
)
from megatron_matpo.config.hf_rope import RopeScaling, read_scaling, rope_fields, rope_problems
from megatron_matpo.config.train import ParallelConfig
from megatron_matpo.errors import ConfigError


@dataclass(frozen=True)
class HfModelConfig:
    """What the trainer needs to know from `config.json` of a decoder."""

    folder: str
    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    """Of dense layers; experts have their own."""
    vocab_size: int
    """Rows of the embedding in the folder; the trainer pads to a multiple of `parallel.tensor`."""
    rope_theta: float
    rms_eps: float
    tie_word_embeddings: bool
    max_positions: int
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    """Tokens that a token attends to, itself included; None for all before it."""
    rope_scaling: RopeScaling | None = None
    moe: MoeShape | None = None
    """Layers with experts; None for a dense model."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> HfModelConfig:
        """Read `FOLDER/config.json`.

        Raises:
            ConfigError: no such folder or file, unreadable JSON, an architecture or a setting that
                the trainer does not implement, or a missing field.
        """
        path = Path(folder)
        if not path.is_dir():
            raise ConfigError(f"model.path={str(folder)!r}: no such folder")
        file = path / "config.json"
        if not file.is_file():
            raise ConfigError(f"model.path={str(folder)!r}: the folder has no config.json")
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file}: not valid JSON ({error})") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{file}: expected a JSON object")
        fields = cast(dict[str, Any], raw)
        architecture = _check_supported(fields, file)
        return cls(
            folder=str(folder),
            architecture=architecture,
            **_read_fields(fields, FAMILIES[architecture], file),
        )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer has experts in place of one feed-forward network."""
        return self.moe is not None and self.moe.layers[layer]


def _check_supported(raw: dict[str, Any], file: Path) -> str:
    """The architecture; refuses it, or settings that would be trained as something else."""
    architectures: list[str] = raw.get("architectures") or []
    known = [name for name in architectures if name in FAMILIES]
    if not known:
        raise ConfigError(
            f"{file}: architectures={architectures} is not supported; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    wrong = [*family_problems(FAMILIES[known[0]], raw), *rope_problems(raw)]
    if wrong:
        raise ConfigError(f"{file}: not supported: {', '.join(wrong)}")
    return known[0]


def _read_fields(raw: dict[str, Any], family: Family, file: Path) -> dict[str, Any]:
    """Map the names of `config.json` to ours."""

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise ConfigError(f"{file}: the field {key!r} is missing")
        return raw[key]

    theta = rope_fields(raw).get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise ConfigError(f"{file}: neither rope_parameters.rope_theta nor rope_theta is set")
    num_heads = int(need("num_attention_heads"))
    if family.is_moe:
        if num_experts(raw) is None:
            raise ConfigError(f"{file}: the field 'num_experts' is missing")
        for key in ("num_experts_per_tok", "moe_intermediate_size"):
            need(key)
    return {
        "hidden_size": int(need("hidden_size")),
        "num_layers": int(need("num_hidden_layers")),
        "num_heads": num_heads,
        "num_kv_heads": int(raw.get("num_key_value_heads") or num_heads),
        "head_dim": int(raw.get("head_dim") or need("hidden_size") // num_heads),
        "ffn_size": int(need("intermediate_size")),
        "vocab_size": int(need("vocab_size")),
        "rope_theta": float(theta),
        "rms_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "max_positions": int(need("max_position_embeddings")),
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "sliding_window": read_window(family, raw),
        "rope_scaling": read_scaling(raw),
        "moe": read_moe(raw) if family.is_moe else None,
    }


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def end_token_ids(folder: str | Path) -> tuple[int, ...]:
    """Tokens with which an engine ends a generation by itself.

    `eos_token_id` of `config.json` and of `generation_config.json`, where there are such.

    Raises:
        ConfigError: a file is not valid JSON.
    """
    found: list[int] = []
    for name in ("config.json", "generation_config.json"):
        file = Path(folder) / name
        try:
            found += _ids(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id"))
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"{file}: not what Hugging Face writes ({error})") from error
    return tuple(dict.fromkeys(found))


def _divisors(*numbers: int) -> str:
    """Common divisors, for error messages."""
    smallest = min(numbers)
    allowed = [d for d in range(1, smallest + 1) if all(n % d == 0 for n in numbers)]
    return ", ".join(str(d) for d in allowed)


def check_layout(hf: HfModelConfig, parallel: ParallelConfig, *, on_gpu: bool = False) -> list[str]:
    """All reasons why the trainer cannot split this model as `parallel` says; empty if it can.

    Each line names the dotted path, the value, the number that it must divide, and what is allowed.
    """
    sizes = {key: value for key, value in vars(parallel).items() if not isinstance(value, bool)}
    problems = [
        f"parallel.{path}={value}: must be at least 1" for path, value in sizes.items() if value < 1
    ]
    return problems or [
        *_tensor_problems(hf, parallel.tensor),
        *_pipeline_problems(hf, parallel),
        *_expert_problems(hf, parallel),
        *(_context_problems(hf, parallel) if on_gpu else ()),
    ]


def _tensor_problems(hf: HfModelConfig, tensor: int) -> Iterator[str]:
    """Heads and channels that tensor parallelism splits."""
    name = Path(hf.folder).name
    has_dense = hf.moe is None or not all(hf.moe.layers)
    parts = [(hf.num_heads, "attention heads")]
    if has_dense:
        parts.append((hf.ffn_size, "feed-forward channels"))
    # Below one key/value head per rank, Megatron splits the rows of a group and gathers its output.
    kv, rows = hf.num_kv_heads, 2 * hf.num_kv_heads * hf.head_dim
    splits = [d for d in range(1, hf.num_heads + 1) if all(count % d == 0 for count, _ in parts)]
    allowed = [d for d in splits if kv % d == 0 or (d % kv == 0 and rows % d == 0)]
    words = ", ".join(map(str, allowed))
    for count, what in parts:
        if count % tensor:
            yield (
                f"parallel.tensor={tensor}: does not divide {count} {what} of {name}; "
                f"allowed: {words}"
            )
    if kv % tensor and (tensor % kv or rows % tensor):
        yield (
            f"parallel.tensor={tensor}: neither divides {kv} key/value heads of {name} nor is a "
            f"multiple of them; allowed: {words}"
        )


def _pipeline_problems(hf: HfModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Layers per stage and per chunk."""
    name = Path(hf.folder).name
    if parallel.virtual > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual={parallel.virtual}: chunks per pipeline stage need "
            "parallel.pipeline of at least 2; use 1"
        )
    elif hf.num_layers % parallel.pipeline:
        yield (
            f"parallel.pipeline={parallel.pipeline}: does not divide {hf.num_layers} layers of "
            f"{name}; allowed: {_divisors(hf.num_layers)}"
        )
    elif hf.num_layers // parallel.pipeline % parallel.virtual:
        per_stage = hf.num_layers // parallel.pipeline
        yield (
            f"parallel.virtual={parallel.virtual}: does not divide the {per_stage} layers of a "
            f"pipeline stage of {name}; allowed: {_divisors(per_stage)}"
        )


def _context_problems(hf: HfModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """What Transformer Engine's attention lacks.

    Source: its `context_parallel.py`, `attn_forward_func_with_cp`: windows only where keys and
    values are exchanged by `a2a` or `all_gather`, and both of these refuse packed rows (`thd`).
    """
    if parallel.context > 1 and hf.sliding_window is not None:
        yield (
            f"parallel.context={parallel.context}: {Path(hf.folder).name} attends to a window of "
            f"{hf.sliding_window} tokens (sliding_window), which Transformer Engine cannot split "
            "over ranks in packed rows; use 1 and more parallel.tensor or parallel.pipeline"
        )


def _expert_problems(hf: HfModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """How experts lie over the ranks of a stage."""
    name = Path(hf.folder).name
    if hf.moe is None:
        if parallel.expert > 1:
            yield f"parallel.expert={parallel.expert}: {name} is dense; allowed: 1"
        return
    if hf.moe.num_experts % parallel.expert:
        yield (
            f"parallel.expert={parallel.expert}: does not divide {hf.moe.num_experts} experts of "
            f"{name}; allowed: {_divisors(hf.moe.num_experts)}"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        yield (
            f"parallel.sequence=false: {name} has experts, which with parallel.tensor="
            f"{parallel.tensor} need the sequence split over the tensor-parallel ranks; use true"
        )
