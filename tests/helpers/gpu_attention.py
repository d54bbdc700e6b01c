"""One attention of packed rows, four ways: ours, Transformer Engine's, padded, and the formula.

Letters in shapes: t tokens of the packed row, b samples, s tokens of the longest, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention layer."""

    queries: int
    keys: int
    d: int


Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(query [t, heads, d], key and value [t, kv heads, d], offsets of samples) -> [t, heads x d]."""


def random_row(heads: Heads, lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Query, key and value of a packed row in bf16 on the GPU, which want gradients."""
    generator = torch.Generator().manual_seed(seed)
    counts = (heads.queries, heads.keys, heads.keys)
    rows = [torch.randn((sum(lengths), n, heads.d), generator=generator) for n in counts]
    return [row.to("cuda", torch.bfloat16).requires_grad_() for row in rows]


def offsets(lengths: Sequence[int]) -> Tensor:
    """Where the samples begin, and the end."""
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).int()


def ours(heads: Heads) -> Attention:
    """The core attention of the local layers: one kernel for each sample."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_matpo.megatron.attention import PackedAttention

    config: Any = SimpleNamespace(kv_channels=heads.d, window_size=None, context_parallel_size=1)
    core = PackedAttention(config, layer_number=1)

    def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
        params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
        return core(query, key, value, None, packed_seq_params=params)

    return attend


def _engine(heads: Heads) -> Any:
    """Transformer Engine's core attention; raises ImportError without it."""
    import transformer_engine.pytorch as te

    return te.DotProductAttention(
        heads.queries, heads.d, num_gqa_groups=heads.keys, attention_dropout=0.0
    )


def engines(heads: Heads) -> Attention:
    """Transformer Engine's attention of the packed row, as the model calls it."""
    core = _engine(heads)

    def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
        longest = int(starts.diff().max())
        return core(
            query,
            key,
            value,
            qkv_format="thd",
            attn_mask_type="padding_causal",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ).flatten(1)

    return attend


def engines_alone(heads: Heads) -> Attention:
    """Transformer Engine's attention, one sample after the other."""
    core = _engine(heads)

    def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
        outputs = [
            core(
                *(x[start:stop][None] for x in (query, key, value)),
                qkv_format="bshd",
                attn_mask_type="causal",
            )[0]
            for start, stop in pairwise(starts.tolist())
        ]
        return torch.cat(outputs)

    return attend


def engines_padded(heads: Heads) -> Attention:
    """Transformer Engine's attention of a rectangle [b, s]; padding is behind every sample."""
    core = _engine(heads)

    def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
        lengths = starts.diff().tolist()
        rectangles = [
            torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)
            for x in (query, key, value)
        ]
        output = core(*rectangles, qkv_format="bshd", attn_mask_type="causal")
        return torch.cat([row[:n] for row, n in zip(output, lengths, strict=True)])

    return attend


def formula(heads: Heads) -> Attention:
    """The definition, in float64."""

    def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
        outputs = []
        for start, stop in pairwise(starts.tolist()):
            q, k, v = (x[start:stop].double().transpose(0, 1) for x in (query, key, value))
            k, v = (x.repeat_interleave(heads.queries // heads.keys, dim=0) for x in (k, v))
            future = torch.ones(stop - start, stop - start, device=q.device).triu(1).bool()
            scores = (q @ k.transpose(1, 2) * heads.d**-0.5).masked_fill(future, float("-inf"))
            outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
        return torch.cat(outputs).flatten(1)

    return attend
