"""Causal attention inside the samples of a packed row, on any device, with torch's own kernel.

This is the core attention of the local layer spec (CPU). On a GPU Transformer Engine's own takes
its place, with the same arguments: rows of shape [t, heads, d] and `PackedSeqParams`.

Why a loop over samples: one kernel per sample computes no attention between samples, and needs no
mask in memory. Measured on one core (forward and backward, 4 heads of 16): 27 samples of 300 tokens
take 0.12 s against 0.19 s padded to a rectangle, lengths from 50 to 4,096 in one row 0.25 s against
1.8 s; only many equally short samples are faster padded (200 of 40 tokens: 0.06 s and 0.05 s).

Letters in shapes: t tokens of this rank, q and k tokens of queries and of keys, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from megatron_matpo.megatron.batch import PlacedBatch, zigzag


def packed_params(placed: PlacedBatch) -> PackedSeqParams:
    """Where the samples of a row begin, as Megatron hands it to its attention and rotary embedding.

    Padding counts as a part of its sample, so there are no padded offsets besides the others.
    """
    offsets = placed.cu_seqlens
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=placed.max_seqlen,
        max_seqlen_kv=placed.max_seqlen,
    )


class PackedAttention(nn.Module):
    """Core attention of the local layer spec; no dropout.

    With a `window_size` of (w, 0) a token sees itself and the w tokens before it.

    Under context parallelism a rank has the queries of its two chunks of every sample and gathers
    the keys and values of all ranks (their gradients are summed and scattered on the way back).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        """Take what Megatron's `Attention` passes to its core; most of it is unused."""
        super().__init__()
        self._scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 1)
        self._window: int | None = None
        if config.window_size is not None and is_layer_window_attention(
            config.window_size,
            config.window_attn_skip_freq,  # type: ignore[arg-type]  (None means every layer)
            layer_number,
        ):
            self._window = config.window_size[0] if config.window_size[0] >= 0 else None
        self._cp_size = config.context_parallel_size
        self._context = pg_collection.cp if self._cp_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[t, heads/tp, d] and [t, kv_heads/tp, d] twice -> [t, heads/tp * d]."""
        assert packed_seq_params is not None and packed_seq_params.cu_seqlens_q is not None
        assert attention_mask is None and attention_bias is None, "causal inside a sample, no more"
        segments = [b - a for a, b in pairwise(packed_seq_params.cu_seqlens_q.tolist())]
        if self._context is not None:
            key = _gather(key, segments, self._context)
            value = _gather(value, segments, self._context)
        lengths = [length // self._cp_size for length in segments]
        samples = zip(query.split(lengths), key.split(segments), value.split(segments), strict=True)
        return torch.cat([self._sample(*parts) for parts in samples]).flatten(1)

    def _sample(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """This rank's queries of a sample, all its keys and values; [q, heads/tp, d]."""
        if self._context is None:
            return self._attend(query, key, value)
        rank = self._context.rank()
        outputs: list[Tensor] = []
        for number, part in zip((rank, 2 * self._cp_size - 1 - rank), query.chunk(2), strict=True):
            end = (number + 1) * len(part)
            outputs.append(self._attend(part, key[:end], value[:end]))
        return torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The q queries belong to the last q of the k positions; [q, heads/tp, d]."""
        window, before = self._window, len(key) - len(query)
        if window is None or len(key) <= window + 1:
            return self._kernel(query, key, value, None)
        # As many queries at a time as the window is long: memory is linear in the sample's length.
        outputs: list[Tensor] = []
        for start in range(0, len(query), max(1, window)):
            part = query[start : start + max(1, window)]
            first = max(0, before + start - window)
            last = before + start + len(part)
            outputs.append(self._kernel(part, key[first:last], value[first:last], window))
        return torch.cat(outputs)

    def _kernel(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        mask = None
        if window is not None or len(query) < len(key):
            column = torch.arange(len(key), device=key.device)
            row = column[len(key) - len(query) :, None]
            mask = column <= row
            if window is not None:
                mask = mask & (column >= row - window)
        output = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[0].transpose(0, 1)


def _gather(local: Tensor, segments: Sequence[int], group: Any) -> Tensor:
    """Rows of all context-parallel ranks in the order of the padded row.

    Collective; on the way back gradients are summed over the ranks and each gets its own rows'.
    """
    gathered = gather_from_sequence_parallel_region(local, group=group)
    places = torch.cat([zigzag(segments, rank, group.size()) for rank in range(group.size())])
    return gathered.index_select(0, places.argsort().to(local.device))
