"""Settings that trade time for memory, as Megatron's."""

from __future__ import annotations

from typing import Any

from megatron_matpo.config.train import OptimConfig, TrainConfig


def recompute_options(train: TrainConfig) -> dict[str, Any]:
    """Arguments of `TransformerConfig` for `train.recompute`.

    `selective` makes the feed-forward part of a layer again (`mlp`; `moe` of a mixture of experts),
    whose activations are the largest. Not attention's, as the name meant in Megatron before fused
    kernels: those keep nothing of the size s x s, so there would be little to gain.
    """
    if train.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]}
    if train.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return {}


def offload_options(optim: OptimConfig) -> dict[str, Any]:
    """Arguments of `OptimizerConfig` for `optim.offload`: everything in pinned host memory.

    Megatron's HybridDeviceOptimizer updates there with torch's AdamW, one instance per parameter so
    that transfers overlap. It reads gradients where the precision-aware optimizer leaves them, so
    it needs that one (Megatron-LM refuses it otherwise, `training/arguments.py`); moments and main
    parameters stay fp32.
    """
    if not optim.offload:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 1.0,
        "overlap_cpu_optimizer_d2h_h2d": True,
        "use_precision_aware_optimizer": True,
    }
