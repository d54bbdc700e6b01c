"""The shape of a Hugging Face model folder, and which trainer layouts it allows. Torch-free.

Invariants:

* only architectures whose every parameter `megatron.mapping` knows are accepted;
* settings of `config.json` that would change the mathematics and that the trainer does not
  implement are refused, never ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from megatron_matpo.config.train import ParallelConfig
from megatron_matpo.errors import ConfigError

SUPPORTED_ARCHITECTURES = ("Qwen3ForCausalLM",)


@dataclass(frozen=True)
class HfModelConfig:
    """What the trainer needs to know from `config.json` of a dense decoder."""

    folder: str
    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    """Rows of the embedding in the folder; the trainer pads to a multiple of `parallel.tensor`."""
    rope_theta: float
    rms_eps: float
    tie_word_embeddings: bool
    max_positions: int
    eos_token_ids: tuple[int, ...]

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
        _check_supported(fields, file)
        return cls(folder=str(folder), **_read_fields(fields, file))


def _check_supported(raw: dict[str, Any], file: Path) -> None:
    """Refuse architectures and settings that would be trained as something else."""
    architectures: list[str] = raw.get("architectures") or []
    if not any(name in SUPPORTED_ARCHITECTURES for name in architectures):
        raise ConfigError(
            f"{file}: architectures={architectures} is not supported; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    rope = _rope(raw)
    expected = {
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "attention_bias": (raw.get("attention_bias", False), False),
        "use_sliding_window": (raw.get("use_sliding_window", False), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    wrong = [
        f"{key}={got!r} (only {want!r})" for key, (got, want) in expected.items() if got != want
    ]
    if wrong:
        raise ConfigError(f"{file}: not supported: {', '.join(wrong)}")


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings: transformers 5 writes `rope_parameters`, older releases `rope_scaling`."""
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _read_fields(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """Map the names of `config.json` to ours."""

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise ConfigError(f"{file}: the field {key!r} is missing")
        return raw[key]

    theta = _rope(raw).get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise ConfigError(f"{file}: neither rope_parameters.rope_theta nor rope_theta is set")
    num_heads = int(need("num_attention_heads"))
    eos: Any = raw.get("eos_token_id")
    eos_ids: tuple[int, ...] = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return {
        "architecture": next(a for a in raw["architectures"] if a in SUPPORTED_ARCHITECTURES),
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
        "eos_token_ids": eos_ids,
    }


def _divisors(*numbers: int) -> str:
    """Common divisors, for error messages."""
    smallest = min(numbers)
    allowed = [d for d in range(1, smallest + 1) if all(n % d == 0 for n in numbers)]
    return ", ".join(str(d) for d in allowed)


def check_layout(hf: HfModelConfig, parallel: ParallelConfig) -> list[str]:
    """All reasons why the trainer cannot split this model as `parallel` says; empty if it can.

    Each line names the dotted path, the value, the number that it must divide, and what is allowed.
    """
    name = Path(hf.folder).name
    problems: list[str] = []
    for path, value in vars(parallel).items():
        if not isinstance(value, bool) and value < 1:
            problems.append(f"parallel.{path}={value}: must be at least 1")
    if problems:
        return problems
    for count, what in (
        (hf.num_heads, "attention heads"),
        (hf.num_kv_heads, "key/value heads"),
        (hf.ffn_size, "feed-forward channels"),
    ):
        if count % parallel.tensor:
            allowed = _divisors(hf.num_heads, hf.num_kv_heads, hf.ffn_size)
            problems.append(
                f"parallel.tensor={parallel.tensor}: does not divide {count} {what} of {name}; "
                f"allowed: {allowed}"
            )
    if hf.num_layers % parallel.pipeline:
        problems.append(
            f"parallel.pipeline={parallel.pipeline}: does not divide {hf.num_layers} layers of "
            f"{name}; allowed: {_divisors(hf.num_layers)}"
        )
    if parallel.expert > 1:
        problems.append(f"parallel.expert={parallel.expert}: {name} is dense; allowed: 1")
    return problems
