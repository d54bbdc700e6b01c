"""AdamW over Megatron's distributed optimizer, with a stateless learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_matpo.config import Config
from megatron_matpo.config.train import OptimConfig
from megatron_matpo.errors import NonFiniteError
from megatron_matpo.megatron.memory_policy import offload_options
from megatron_matpo.megatron.optimizer_state import members_of
from megatron_matpo.megatron.precision import optimizer_settings, resolve_precision


def learning_rate(optim: OptimConfig, update_index: int) -> float:
    """Learning rate of an update: linear warm-up to `lr`, then `optim.schedule` down to `min_lr`.

    With w = `warmup_steps`, d = `decay_steps` and p = (update_index - w) / (d - w), at most 1:
    `linear` is lr - p (lr - min_lr), `cosine` min_lr + (1 + cos(pi p)) / 2 (lr - min_lr). So
    updates w - 1 and w have `lr`, update d and all later ones `min_lr`.

    Args:
        optim: section `optim`; unless the schedule is constant, with `decay_steps` (see `planned`).
        update_index: optimizer updates made before this one; 0 gets `lr / warmup_steps`.
    """
    if update_index < optim.warmup_steps:
        return optim.lr * (update_index + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    assert optim.decay_steps > 0, "the schedule has no length: OptimConfig.planned comes first"
    if update_index >= optim.decay_steps:
        return optim.min_lr
    progress = (update_index - optim.warmup_steps) / (optim.decay_steps - optim.warmup_steps)
    left = (
        1.0 - progress if optim.schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * progress)
    )
    return optim.min_lr + left * (optim.lr - optim.min_lr)


def build_optimizer(config: Config, models: Sequence[Any]) -> MegatronOptimizer:
    """AdamW whose fp32 parameters and moments are split over the data-parallel ranks.

    Every trainer rank calls, with DDP-wrapped chunks that already hold their weights.
    """
    optim = config.optim
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            # Clipping happens in `step`, between the check and the update.
            clip_grad=0.0,
            use_distributed_optimizer=True,
            **optimizer_settings(config, resolve_precision(config)),
            **offload_options(optim),
        ),
        list(models),
        use_gloo_process_groups=False,
    )
    for member in members_of(optimizer):
        _create_moments(member.optimizer)
    return optimizer


def _create_moments(inner: torch.optim.Optimizer | None) -> None:
    """Make the moments now instead of in the first step.

    A run could otherwise neither save before its first update nor restore into a new process.
    """
    if isinstance(inner, HybridDeviceOptimizer):
        for part in inner.sub_optimizers:
            _create_moments(part)
        inner._sync_sub_optimizers_state_to_hdo()
        return
    if inner is None:
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            if isinstance(inner, torch.optim.AdamW):
                # Transformer Engine's FusedAdam counts in the parameter groups instead.
                moments["step"] = torch.tensor(0.0)
            inner.state[parameter] = moments


def step(optimizer: MegatronOptimizer, optim: OptimConfig, update_index: int) -> float:
    """Clip and apply one update. Every rank calls after `schedule.forward_backward`.

    Returns:
        Norm of the whole model's gradient before clipping, equal on all ranks.

    Raises:
        NonFiniteError: the norm is not finite; parameters and moments are untouched.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        raise NonFiniteError(f"gradient norm {grad_norm} at update {update_index}")
    if optim.clip_grad > 0:
        for member in members_of(optimizer):
            clip_grad_by_total_norm_fp32(
                member.get_parameters(),
                optim.clip_grad,
                grad_norm,
                use_decoupled_grad=optim.offload,
            )
    lr = learning_rate(optim, update_index)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
    optimizer.step_with_ready_grads()
    return grad_norm
