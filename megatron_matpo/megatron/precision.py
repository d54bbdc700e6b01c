"""The precision policy inside the trainer: asks the device, and speaks Megatron's settings.

The policy itself is `config.precision`; here is what only a process with torch can know, and the
translation. FP8 and the fused kernels are written against the documented interfaces of
Megatron-Core 0.16.1 (`transformer_config.py:427-496`, `fp8_utils.py`) and Transformer Engine;
`docs/gpu_results.md` says what has been run.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from typing import Any

import torch

from megatron_matpo.config import Config
from megatron_matpo.config.precision import FP8_RECIPES, Platform, Precision, decide_precision

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_precision(config: Config) -> Precision:
    """What this process trains in; the same on all ranks of one kind of device.

    Raises:
        ConfigError: `precision` asks for what this platform does not have.
    """
    return decide_precision(config, this_platform(config.cluster.device))


def parameter_dtype(config: Config) -> torch.dtype:
    """Dtype of the model's parameters.

    Raises:
        ConfigError: `precision` asks for what this platform does not have.
    """
    return _DTYPES[resolve_precision(config).parameters]


@functools.cache
def this_platform(device: str) -> Platform:
    """What the driver and the installed packages say; `device` is `cuda` or `cpu`."""
    if device == "cpu":
        return Platform()
    return Platform(
        capability=torch.cuda.get_device_capability(),
        # An absent Transformer Engine is reported where the layers are built.
        te_version=_version_of("transformer_engine"),
        cuda_version=parse_version(torch.version.cuda or ""),
    )


def parse_version(text: str) -> tuple[int, int] | None:
    """`2.11.0+c188b53` -> (2, 11); None if the text does not start with two numbers."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _version_of(package: str) -> tuple[int, int] | None:
    try:
        return parse_version(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return None


def transformer_settings(config: Config, precision: Precision) -> dict[str, Any]:
    """The fields of Megatron's TransformerConfig that depend on the precision."""
    dtype = _DTYPES[precision.parameters]
    settings: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
    }
    if not precision.fp8_recipe:
        return settings
    num_bf16 = config.fp8.first_last_layers_bf16
    return settings | {
        "fp8": FP8_RECIPES[precision.fp8_recipe].format,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_param": config.fp8.params,
        "first_last_layers_bf16": num_bf16 > 0,
        "num_layers_at_start_in_bf16": num_bf16,
        "num_layers_at_end_in_bf16": num_bf16,
        # Delayed scaling takes the largest value of a window; Megatron's default window is one
        # step. The values are those of Transformer Engine's own DelayedScaling.
        **(
            {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
            if precision.fp8_recipe == "delayed"
            else {}
        ),
    }


def ddp_settings(config: Config, precision: Precision) -> dict[str, Any]:
    """The fields of Megatron's DistributedDataParallelConfig that depend on the precision."""
    in_fp8 = bool(precision.fp8_recipe) and config.fp8.params
    return {
        "fp8_param_gather": in_fp8,
        "reuse_grad_buf_for_mxfp8_param_ag": in_fp8 and precision.fp8_recipe == "mxfp8",
    }


def optimizer_settings(config: Config, precision: Precision) -> dict[str, Any]:
    """The fields of Megatron's OptimizerConfig that depend on the precision."""
    dtype = _DTYPES[precision.parameters]
    ddp = ddp_settings(config, precision)
    return {
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        # Only weights in FP8 change how the optimizer works.
        "fp8_recipe": precision.fp8_recipe if ddp["fp8_param_gather"] else None,
        "reuse_grad_buf_for_mxfp8_param_ag": ddp["reuse_grad_buf_for_mxfp8_param_ag"],
    }


@dataclass(frozen=True)
class FusedKernels:
    """Kernels of NVIDIA apex that are used because they are there; none is required."""

    grad_accumulation: bool
    """The weight gradient's matrix product adds into the fp32 buffer itself."""
    reason: str
    """One line for the log."""


def fused_kernels(device: str) -> FusedKernels:
    """What of NVIDIA apex this platform has. apex's norms are for LayerNorm; our models have none.

    Megatron refuses `gradient_accumulation_fusion` without apex's extension also where Transformer
    Engine could do it, because the output layer is Megatron's own
    (`tensor_parallel/layers.py:924`).
    """
    if device == "cpu":
        return FusedKernels(False, "apex: not on the CPU platform")
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        return FusedKernels(False, "apex: its fused_weight_gradient_mlp_cuda is not installed")
    return FusedKernels(True, "apex: fused accumulation of weight gradients")


def describe(config: Config) -> str:
    """One line for the trainer's log: precision, recipe, and why.

    Raises:
        ConfigError: `precision` asks for what this platform does not have.
    """
    precision = resolve_precision(config)
    fp8 = f", matrix products in fp8 ({precision.fp8_recipe})" if precision.fp8_recipe else ""
    kernels = fused_kernels(config.cluster.device)
    return f"precision: {precision.parameters}{fp8}: {precision.reason}; {kernels.reason}"
