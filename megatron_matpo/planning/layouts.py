"""Layouts that fit, best first.

The preference: the least estimated time of an update, to about 5 %; among equals no offload, then
the smallest tensor-, context- and pipeline-parallel sizes, then the least recomputation. Tensor
parallelism stays inside a node.

The estimate ranks layouts; it is no forecast. Counted: products at a share of the GPU's peak,
recomputation, collectives of tensor, context, expert and data parallelism at their links' bandwidth
without overlap, the pipeline's bubble, an offloaded optimizer's way over PCIe.
Source of the operation count: 6 per parameter and token (arXiv:2001.08361, section 2.1), and
12 L q T for attention, halved for causality (arXiv:2104.04473, appendix).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_matpo.config.gpus import Gpu
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.planning.batches import Workload, micro_batches_per_rank
from megatron_matpo.planning.colocated import host_bytes, peak_bytes
from megatron_matpo.planning.engines import EngineMemory
from megatron_matpo.planning.ledger import Ledger, stage_ledger, worst_stage
from megatron_matpo.planning.parameters import active_parameters, trained_parameters
from megatron_matpo.planning.pipeline import bubble_frac
from megatron_matpo.planning.shape import Job, Layout

# Assumptions of the ranking.
_EFFICIENCY = 0.4
"""Share of the peak that products and attention reach."""
_NETWORK_BYTES_S = 50e9
"""Per GPU, between nodes: one 400 Gbit/s port each."""
_PCIE_BYTES_S = 25e9
_MAX_PIPELINE = 16
_MAX_CONTEXT = 8


@dataclass(frozen=True)
class Site:
    """Where the trainer runs."""

    gpu: Gpu
    num_gpus: int
    """For the trainer."""
    gpus_per_node: int
    shared_with: EngineMemory | None = None
    """Engine that is on the same GPU (`cluster.placement: colocated`)."""


@dataclass(frozen=True)
class Proposal:
    """A layout with what it costs."""

    layout: Layout
    ledger: Ledger
    """Of the pipeline stage that needs most while it trains."""
    peak: int
    """Bytes of a GPU, whatever is on it, in the phase of a step that needs most."""
    host: int
    """Bytes of the host's memory, per rank."""
    num_micro_batches: int
    """Per update and rank."""
    seconds: float
    """Estimated time of an update; for the order only."""


def propose(
    job: Job, site: Site, workload: Workload, budget: int, updates: int, limit: int = 5
) -> list[Proposal]:
    """Layouts of all `site.num_gpus` GPUs that fit into their memory, best first.

    Of one split only the best way to trade time for memory is named.
    """
    best: dict[tuple[int, int, int, int], Proposal] = {}
    for layout in candidates(job.hf, site):
        proposal = appraise(replace(job, layout=layout), site, workload, budget, updates)
        split = (layout.tensor, layout.pipeline, layout.context, layout.expert)
        if proposal.peak <= site.gpu.memory_gib * 2**30 and (
            split not in best or _preference(proposal) < _preference(best[split])
        ):
            best[split] = proposal
    return sorted(best.values(), key=_preference)[:limit]


def _preference(proposal: Proposal) -> tuple[float, ...]:
    layout = proposal.layout
    return (
        round(math.log(proposal.seconds) / 0.05),
        layout.offload,
        layout.tensor,
        layout.context,
        layout.pipeline,
        layout.expert,
        ("none", "selective", "full").index(layout.recompute),
    )


def appraise(job: Job, site: Site, workload: Workload, budget: int, updates: int) -> Proposal:
    """Memory and estimated time of the job's layout."""
    count = micro_batches_per_rank(workload, budget, job.layout.data, updates)
    ledgers = [stage_ledger(job, stage, count) for stage in range(job.layout.pipeline)]
    seconds = update_seconds(job, site, workload, updates, count)
    return Proposal(
        layout=job.layout,
        ledger=worst_stage(job, count),
        peak=max(peak_bytes(ledger, site.shared_with) for ledger in ledgers),
        host=max(host_bytes(ledger, site.shared_with) for ledger in ledgers),
        num_micro_batches=count,
        seconds=seconds,
    )


def candidates(hf: HfModelConfig, site: Site) -> Iterator[Layout]:
    """Layouts that divide the model and use all GPUs, tensor parallelism inside a node."""
    tensors = [
        t
        for t in (1, 2, 4, 8)
        if t <= site.gpus_per_node
        and not any(n % t for n in (hf.num_heads, hf.num_kv_heads, *_dense_sizes(hf)))
    ]
    pipelines = [p for p in range(1, _MAX_PIPELINE + 1) if hf.num_layers % p == 0]
    contexts = [c for c in (1, 2, 4, 8) if c <= _MAX_CONTEXT]
    # Transformer Engine splits no packed row whose attention has a window; see `check_layout`.
    contexts = contexts if hf.sliding_window is None else [1]
    experts = [e for e in (1, 2, 4, 8, 16, 32, 64) if hf.moe and hf.moe.num_experts % e == 0] or [1]
    modes = ("none", "selective", "full")
    for t, p, c, e, recompute, offload in product(
        tensors, pipelines, contexts, experts, modes, (False, True)
    ):
        if site.num_gpus % (t * p * c) == 0 and (site.num_gpus // p) % e == 0:
            yield Layout(
                tensor=t,
                pipeline=p,
                context=c,
                data=site.num_gpus // (t * p * c),
                expert=e,
                sequence=t > 1,
                recompute=recompute,
                offload=offload,
            )


def _dense_sizes(hf: HfModelConfig) -> list[int]:
    """Feed-forward channels that tensor parallelism splits; experts stay whole."""
    has_dense = not all(hf.is_moe_layer(layer) for layer in range(hf.num_layers))
    return [hf.ffn_size] if has_dense else []


def update_seconds(
    job: Job, site: Site, workload: Workload, updates: int, num_micro_batches: int
) -> float:
    """Estimated time of one update; see the module for what is counted."""
    layout = job.layout
    # Micro-batches are balanced over the replicas, but no replica has less than a trajectory.
    share = sum(workload.lengths) / updates / layout.data
    tokens = max(share, max(workload.lengths))
    compute = _compute_seconds(job, site, tokens, workload.length_seen)
    tensor = _tensor_seconds(job, site, tokens / layout.context)
    context = _context_seconds(job, site, tokens / layout.context)
    experts = _expert_seconds(job, site, tokens / layout.context)
    busy = (compute + tensor + context + experts) / layout.pipeline
    return busy / (1 - bubble_frac(layout, num_micro_batches)) + _optimizer_seconds(job)


def _compute_seconds(job: Job, site: Site, tokens: float, length: float) -> float:
    """All stages of one replica, one after another; tokens over all context-parallel ranks."""
    hf, layout = job.hf, job.layout
    peak = site.gpu.fp8_tflops if job.fp8_recipe else site.gpu.bf16_tflops
    matmul = 6.0 * active_parameters(job) * tokens
    attention = 6.0 * hf.num_layers * hf.num_heads * hf.head_dim * length * tokens
    again = {"none": 0.0, "selective": feed_forward_share(hf), "full": 1.0}[layout.recompute]
    shards = layout.tensor * layout.context * _EFFICIENCY * 1e12
    # Attention stays in bf16; a recomputed forward pass is a third of the work.
    products = matmul * (1 + again / 3) / (peak * shards)
    again_attention = 1 / 3 if layout.recompute == "full" else 0.0
    return products + attention * (1 + again_attention) / (site.gpu.bf16_tflops * shards)


def feed_forward_share(hf: HfModelConfig) -> float:
    """Of a layer's products, those that `recompute: selective` makes again."""
    channels = hf.moe.experts_per_token * hf.moe.ffn_size if hf.moe else hf.ffn_size
    feed_forward = 3 * channels
    attention = 2 * (hf.num_heads + hf.num_kv_heads) * hf.head_dim
    return feed_forward / (feed_forward + attention)


def _tensor_seconds(job: Job, site: Site, tokens: float) -> float:
    """Per layer four collectives of [T, h] each way, and those of recomputation."""
    t = job.layout.tensor
    passes = {"none": 8, "selective": 10, "full": 12}[job.layout.recompute]
    moved = passes * job.hf.num_layers * tokens * job.hf.hidden_size * job.element_bytes
    return moved * (t - 1) / t / (site.gpu.nvlink_gb_s / 2 * 1e9)


def _context_seconds(job: Job, site: Site, tokens: float) -> float:
    """Keys and values once around the ring forward, and with their gradients backward."""
    layout, hf = job.layout, job.hf
    k = hf.num_kv_heads * hf.head_dim / layout.tensor
    inside = layout.tensor * layout.context <= site.gpus_per_node
    speed = site.gpu.nvlink_gb_s / 2 * 1e9 if inside else _NETWORK_BYTES_S
    moved = 3 * 2 * hf.num_layers * tokens * (layout.context - 1) * k * job.element_bytes
    return moved / speed


def _expert_seconds(job: Job, site: Site, tokens: float) -> float:
    """Per layer with experts, tokens go to their experts and back, forward and backward."""
    layout, hf = job.layout, job.hf
    if hf.moe is None:
        return 0.0
    passes = {"none": 4, "selective": 6, "full": 6}[layout.recompute]
    sent = tokens / layout.sequence_split * hf.moe.experts_per_token * hf.hidden_size
    moved = passes * sum(hf.moe.layers) * sent * job.element_bytes
    # The ranks of an expert-parallel group follow one another.
    inside = layout.expert <= site.gpus_per_node
    speed = site.gpu.nvlink_gb_s / 2 * 1e9 if inside else _NETWORK_BYTES_S
    return moved * (layout.expert - 1) / layout.expert / speed


def _optimizer_seconds(job: Job) -> float:
    """Gradients reduced and parameters gathered; offloaded, the shard goes over PCIe, too."""
    worst = max(trained_parameters(job, stage) for stage in (0, job.layout.pipeline - 1))
    ranks = job.layout.optimizer_ranks
    network = worst * (4 + job.element_bytes) * (ranks - 1) / ranks / _NETWORK_BYTES_S
    # fp32 gradients to the host and parameters back; the host's Adam takes about as long again.
    offload = 2 * worst / ranks * (4 + job.element_bytes) / _PCIE_BYTES_S
    return network + (offload if job.layout.offload else 0.0)
