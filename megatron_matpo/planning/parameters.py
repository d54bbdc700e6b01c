"""Weights, gradients and optimizer of one rank, in bytes. Exact: `tests/dist/test_ledger.py`.

Sources: Megatron-Core 0.16.1, `distributed/param_and_grad_buffer.py:600-700` (flat buffers and
their padding), `optimizer/distrib_optimizer.py` (what the ranks share); Rajbhandari et al. 2020
(arXiv:1910.02054, section 3.1) for the bytes per parameter of mixed-precision Adam.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from megatron_matpo.planning.shape import Job, Layout

_START = 64
_END = 128


@dataclass(frozen=True)
class Parameter:
    """One parameter of a rank."""

    numel: int
    in_layer_matmul: bool = False
    """A matrix of a layer: what FP8 applies to."""
    is_shared: bool = False
    """Tied embedding that lies on two stages, which has a bucket of its own."""
    is_expert: bool = False
    """Lies in a buffer of its own, which other ranks share than that of the rest."""
    is_adapter: bool = False


def layer_parameters(job: Job, layer: int) -> list[Parameter]:
    """One decoder layer on one rank, in Megatron's order."""
    hf, t = job.hf, job.layout.tensor
    h, q, k = hf.hidden_size, hf.num_heads * hf.head_dim, hf.num_kv_heads * hf.head_dim
    bias = [Parameter((q + 2 * k) // t)] if hf.qkv_bias else []
    norms = [Parameter(hf.head_dim), Parameter(hf.head_dim)] if hf.qk_norm else []
    return [
        Parameter(h),
        Parameter(h * q // t, True),
        Parameter(h * (q + 2 * k) // t, True),
        *bias,
        *norms,
        Parameter(h),
        *_feed_forward(job, layer),
        *_adapters(job, layer),
    ]


def _feed_forward(job: Job, layer: int) -> list[Parameter]:
    """Gate and up as one matrix, then down; of experts the rank's own, whole, after the router."""
    hf, layout = job.hf, job.layout
    h, moe = hf.hidden_size, hf.moe
    if moe is None or not hf.is_moe_layer(layer):
        size = h * hf.ffn_size // layout.tensor
        return [Parameter(2 * size, True), Parameter(size, True)]
    size = h * moe.ffn_size
    expert = [Parameter(2 * size, True, is_expert=True), Parameter(size, True, is_expert=True)]
    return [Parameter(h * moe.num_experts), *expert * (moe.num_experts // layout.expert)]


def _adapters(job: Job, layer: int) -> list[Parameter]:
    """A and B of every linear with a target (`megatron/lora.py`); As of fused targets are stacked.

    A column-parallel linear has all of A and a part of B on every rank, a row-parallel one the
    reverse. Experts have none.
    """
    hf, t, r = job.hf, job.layout.tensor, job.lora_rank
    h, q, k = hf.hidden_size, hf.num_heads * hf.head_dim, hf.num_kv_heads * hf.head_dim
    columns: list[tuple[tuple[str, ...], int]] = [(("q_proj", "k_proj", "v_proj"), q + 2 * k)]
    rows = [("o_proj", q)]
    if not hf.is_moe_layer(layer):
        columns.append((("gate_proj", "up_proj"), 2 * hf.ffn_size))
        rows.append(("down_proj", hf.ffn_size))
    sizes: list[int] = []
    for names, outputs in columns:
        if count := sum(name in job.lora_layers for name in names):
            sizes += [count * r * h, outputs // t * r]
    for name, inputs in rows:
        if name in job.lora_layers:
            sizes += [r * inputs // t, h * r]
    return [Parameter(size, is_adapter=True) for size in sizes]


def chunk_parameters(job: Job, stage: int, chunk: int) -> list[Parameter]:
    """One model chunk of a pipeline stage; the first has the embedding, the last the output layer.

    With tied embeddings the last stage has a copy of the embedding, unless it is the first, too.
    """
    hf, layout = job.hf, job.layout
    embedding = job.padded_vocab // layout.tensor * hf.hidden_size
    is_first = stage == 0 and chunk == 0
    is_last = stage == layout.pipeline - 1 and chunk == layout.virtual - 1
    is_shared = hf.tie_word_embeddings and layout.pipeline > 1
    result: list[Parameter] = [Parameter(embedding, is_shared=is_shared)] if is_first else []
    for layer in job.layers_of(stage, chunk):
        result += layer_parameters(job, layer)
    if is_last:
        result.append(Parameter(hf.hidden_size))
        if not hf.tie_word_embeddings or is_shared:
            result.append(Parameter(embedding, is_shared=is_shared))
    return result


def stage_parameters(job: Job, stage: int) -> list[list[Parameter]]:
    """All chunks of a stage."""
    return _stage_parameters(_split_of(job), stage)


def _split_of(job: Job) -> Job:
    """The job with what decides its parameters and nothing else, so that layouts share results."""
    layout = Layout(
        tensor=job.layout.tensor,
        pipeline=job.layout.pipeline,
        context=1,
        data=1,
        virtual=job.layout.virtual,
        expert=job.layout.expert,
    )
    return replace(job, layout=layout, micro_batch_tokens=1)


@functools.lru_cache(maxsize=256)
def _stage_parameters(split: Job, stage: int) -> list[list[Parameter]]:
    return [chunk_parameters(split, stage, chunk) for chunk in range(split.layout.virtual)]


def buffer_numel(parameters: list[Parameter], ranks: int) -> int:
    """Elements of the flat buffer of one chunk, with its padding.

    Parameters begin at multiples of 64 elements and buckets end at multiples of 128 and of `ranks`;
    gradients are reduced at the end and not overlapped, so there is one bucket, besides that of a
    shared embedding.
    """
    end = math.lcm(ranks, _END)
    position, open_bucket = 0, False
    for parameter in reversed(parameters):
        position = _pad(position, _START)
        if parameter.is_shared and open_bucket:
            position, open_bucket = _pad(position, end), False
        position += parameter.numel
        open_bucket = True
        if parameter.is_shared:
            position, open_bucket = _pad(position, end), False
    return _pad(position, end) if open_bucket else position


def num_parameters(job: Job, stage: int) -> int:
    """Parameters of a stage on one tensor-parallel rank."""
    return _numel(_split_of(job), stage, False)


def trained_parameters(job: Job, stage: int) -> int:
    """Of them, those that are trained: all, or the adapters."""
    return _numel(_split_of(job), stage, bool(job.lora_rank))


@functools.lru_cache(maxsize=256)
def _numel(split: Job, stage: int, only_adapters: bool) -> int:
    chunks = _stage_parameters(split, stage)
    return sum(p.numel for chunk in chunks for p in chunk if p.is_adapter or not only_adapters)


def _padded(job: Job, stage: int, *, is_expert: bool) -> int:
    """Elements of the stage's gradient buffers of one kind; frozen weights are in none."""
    ranks = job.layout.expert_replicas if is_expert else job.layout.optimizer_ranks
    return _padded_for(_split_of(job), stage, is_expert, ranks)


@functools.lru_cache(maxsize=4096)
def _padded_for(job: Job, stage: int, is_expert: bool, ranks: int) -> int:
    chunks = [
        [p for p in chunk if p.is_expert is is_expert and (p.is_adapter or not job.lora_rank)]
        for chunk in stage_parameters(job, stage)
    ]
    return sum(buffer_numel(chunk, ranks) for chunk in chunks)


def _all_padded(job: Job, stage: int) -> int:
    return _padded(job, stage, is_expert=False) + _padded(job, stage, is_expert=True)


def weight_bytes(job: Job, stage: int) -> int:
    """The model's parameters and adapters; with FP8 also the copies that matrix products read.

    Transformer Engine keeps a matrix twice in FP8, as it is and transposed, between the
    micro-batches of an update. With `fp8.params` these two are all there is of it.
    """
    frozen = num_parameters(job, stage) - trained_parameters(job, stage)
    total = (_all_padded(job, stage) + frozen) * job.element_bytes
    if not job.fp8_recipe:
        return total
    matmul = _fp8_numel(job, stage)
    return total + 2 * matmul - (job.element_bytes * matmul if job.fp8_params else 0)


def _fp8_numel(job: Job, stage: int) -> int:
    """Elements of the stage's matrices in FP8; bf16 layers count as spread over all stages."""
    chunks = stage_parameters(job, stage)
    matmul = sum(p.numel for chunk in chunks for p in chunk if p.in_layer_matmul)
    return matmul * (job.hf.num_layers - job.fp8_bf16_layers) // job.hf.num_layers


def gradient_bytes(job: Job, stage: int) -> int:
    """The flat fp32 buffers that micro-batches add into."""
    return _all_padded(job, stage) * 4


def optimizer_bytes(job: Job, stage: int) -> int:
    """On the GPU, per rank: fp32 copies of bf16 parameters, and two fp32 moments, split."""
    if job.layout.offload:
        return 0
    return _share(job, stage) * (8 if job.parameters == "fp32" else 12)


def host_bytes(job: Job, stage: int) -> int:
    """In the host's memory, per rank: an offloaded optimizer, and the reference model.

    Megatron's HybridDeviceOptimizer keeps, per parameter, the fp32 copy, a gradient and two moments
    (`cpu_offloading/hybrid_optimizer.py`).
    """
    optimizer = _share(job, stage) * 16 if job.layout.offload else 0
    reference = num_parameters(job, stage) * job.element_bytes if job.has_reference else 0
    return optimizer + reference


def _share(job: Job, stage: int) -> int:
    dense = -(-_padded(job, stage, is_expert=False) // job.layout.optimizer_ranks)
    return dense + -(-_padded(job, stage, is_expert=True) // job.layout.expert_replicas)


def total_parameters(job: Job) -> int:
    """Of the whole model, the padded rows of the vocabulary left out."""
    return _parameters(job, job.hf.moe.num_experts if job.hf.moe else 0)


def active_parameters(job: Job) -> int:
    """Of them, those that one token meets."""
    return _parameters(job, job.hf.moe.experts_per_token if job.hf.moe else 0)


def _parameters(job: Job, num_experts: int) -> int:
    """With so many experts per layer that has any; the router is whole in any case."""
    hf = job.hf
    h, q, k = hf.hidden_size, hf.num_heads * hf.head_dim, hf.num_kv_heads * hf.head_dim
    layer = h * (2 * q + 2 * k) + 2 * h
    layer += (q + 2 * k if hf.qkv_bias else 0) + (2 * hf.head_dim if hf.qk_norm else 0)
    feed_forward = 0
    for index in range(hf.num_layers):
        if hf.moe is not None and hf.is_moe_layer(index):
            feed_forward += h * hf.moe.num_experts + num_experts * 3 * h * hf.moe.ffn_size
        else:
            feed_forward += 3 * h * hf.ffn_size
    embeddings = hf.vocab_size * h * (1 if hf.tie_word_embeddings else 2)
    return hf.num_layers * layer + feed_forward + embeddings + h


def _pad(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
