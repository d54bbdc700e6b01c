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
from megatron_matpo.megatron.parallel import resolve_precision


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
    dtype = resolve_precision(config)
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
            params_dtype=dtype,
            bf16=dtype.itemsize == 2,
        ),
        list(models),
        # Where NCCL is the backend, checkpoints gather optimizer state through host memory.
        use_gloo_process_groups=config.cluster.device == "cuda",
    )
    for member in _members(optimizer):
        _create_moments(member.optimizer)
    return optimizer


def _create_moments(inner: torch.optim.Optimizer | None) -> None:
    """Make torch's AdamW state now instead of in its first step.

    Megatron cannot describe an optimizer without state (`distrib_optimizer.py:641`), which would
    leave a run unable to save before its first update, or to restore into a new process.
    """
    if not isinstance(inner, torch.optim.AdamW):
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            inner.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def load_state(optimizer: MegatronOptimizer, saved: dict[str, Any]) -> None:
    """Take over what `optimizer.sharded_state_dict` described and a checkpoint filled in.

    Megatron's loader of the `fully_reshardable` format leaves torch AdamW's `step` out of the
    source but asks for it in the target (`distrib_optimizer.py:940,2101`), so `step`, which the
    first half restores, is put aside during the second.
    """
    (member,) = _members(optimizer)
    member.load_state_dict({k: v for k, v in saved.items() if not k.startswith("param_state")})
    states = [s for s in member.optimizer.state.values() if "step" in s]
    steps = [s.pop("step") for s in states]
    member.load_parameter_state_from_fully_reshardable(saved["param_state"])
    for state, step_count in zip(states, steps, strict=True):
        # torch's loader shares one tensor between all parameters, each of which counts it up.
        state["step"] = step_count.clone()


def _members(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron chains one optimizer per kind of parameter; a dense model has one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


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
        for member in _members(optimizer):
            clip_grad_by_total_norm_fp32(member.get_parameters(), optim.clip_grad, grad_norm)
    lr = learning_rate(optim, update_index)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
    optimizer.step_with_ready_grads()
    return grad_norm
