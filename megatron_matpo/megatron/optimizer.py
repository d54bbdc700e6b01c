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

from megatron_matpo.config import Config
from megatron_matpo.config.train import OptimConfig
from megatron_matpo.errors import NonFiniteError
from megatron_matpo.megatron.optimizer_state import member_of
from megatron_matpo.megatron.precision import optimizer_settings, resolve_precision


def learning_rate(optim: OptimConfig, update_index: int) -> float:
    """Learning rate of an update: linear warm-up to `optim.lr`, then constant.

    Args:
        optim: section `optim`.
        update_index: optimizer updates made before this one; 0 gets `lr / warmup_steps`.
    """
    if update_index >= optim.warmup_steps:
        return optim.lr
    return optim.lr * (update_index + 1) / optim.warmup_steps


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
        ),
        list(models),
        use_gloo_process_groups=False,
    )
    _create_moments(member_of(optimizer).optimizer)
    return optimizer


def _create_moments(inner: torch.optim.Optimizer | None) -> None:
    """Make the moments now instead of in the first step.

    A run could otherwise neither save before its first update nor restore into a new process.
    """
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
        raise NonFiniteError(
            f"gradient norm {grad_norm} at update {update_index}; nothing was changed"
        )
    if optim.clip_grad > 0:
        parameters = member_of(optimizer).get_parameters()
        clip_grad_by_total_norm_fp32(parameters, optim.clip_grad, grad_norm)
    lr = learning_rate(optim, update_index)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
    optimizer.step_with_ready_grads()
    return grad_norm
