"""Violations in the sections `optim` and `train`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_matpo.config.root import Config

TRAIN_CHOICES: dict[str, tuple[str, ...]] = {
    "optim.schedule": ("constant", "linear", "cosine"),
    "train.recompute": ("none", "selective", "full"),
    "train.on_non_finite": ("stop", "skip"),
}
TRAIN_AT_LEAST: dict[str, float] = {
    "optim.lr": 0,
    "optim.min_lr": 0,
    "optim.warmup_steps": 0,
    "optim.decay_steps": 0,
    "optim.weight_decay": 0,
    "optim.clip_grad": 0,
    "train.micro_batch_tokens": 1,
    "train.logprob_chunk_tokens": 1,
    "train.max_skipped_updates": 1,
    "train.peak_tflops": 0,
}


def check_train(config: Config) -> Iterator[str]:
    """Violations that the configuration alone shows."""
    optim = config.optim
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr={optim.min_lr:g}: must be at most optim.lr={optim.lr:g}"
    if 0 < optim.decay_steps <= optim.warmup_steps:
        yield (
            f"optim.decay_steps={optim.decay_steps}: counts the warm-up too, so it must be 0 (all "
            f"updates) or more than optim.warmup_steps={optim.warmup_steps}"
        )
    if optim.offload and config.cluster.device == "cpu":
        yield (
            "optim.offload=true: on the CPU platform (cluster.gpus_per_node=0) the optimizer is on "
            "the host already; use false"
        )
    elif optim.offload and config.precision == "fp32":
        yield (
            "optim.offload=true: needs bf16 parameters (precision=auto or bf16); Megatron's "
            "offloaded optimizer does not take over loaded fp32 weights"
        )
