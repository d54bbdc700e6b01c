"""What the plan reckons with, for models and layouts of tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.planning.shape import Job, Layout


def bf16_job(hf: HfModelConfig, layout: Layout, **changes: Any) -> Job:
    """Full fine-tuning in bf16 on GPUs, micro-batches of 40,960 tokens, without a reference."""
    base = Job(
        hf=hf,
        layout=layout,
        parameters="bf16",
        fp8_recipe="",
        fp8_params=False,
        fp8_bf16_layers=0,
        micro_batch_tokens=40_960,
        logprob_chunk_tokens=2048,
        bucket_mb=128,
        has_reference=False,
        is_local=False,
    )
    return replace(base, **changes)
