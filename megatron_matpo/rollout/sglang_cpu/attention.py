"""Attention for SGLang on a CPU: all requests of a batch at once.

SGLang's `torch_native` backend calls attention once per request and layer, and on a prompt with a
cached prefix recomputes the whole prefix's rows. With a small model that is most of the time: at 64
concurrent requests decoding is about twice as fast with this class. It is registered through
SGLang's own registry, and whatever it does not handle goes to the class that it extends.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class BatchedCpuAttention(TorchNativeAttnBackend):
    """`torch_native`, over all requests at once. R requests, H query heads, D head size."""

    def _run_sdpa_forward_decode(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> Tensor:
        """One query token [R, H, D] per request, written to `output`."""
        if encoder_lens is not None or sliding_window_size is not None:
            return super()._run_sdpa_forward_decode(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                encoder_lens,
                scaling,
                enable_gqa,
                causal,
                is_cross_attn,
                sliding_window_size,
            )
        longest = int(seq_lens.max())
        # [R, longest] cache slots. Slots past a request's end are stale but exist; they are masked.
        slots = req_to_token[req_pool_indices, :longest]
        is_own = torch.arange(longest) < seq_lens.unsqueeze(1)
        attended = scaled_dot_product_attention(
            query.unsqueeze(2),
            k_cache[slots].transpose(1, 2).to(query.dtype),
            v_cache[slots].transpose(1, 2).to(query.dtype),
            attn_mask=is_own[:, None, None, :],
            scale=scaling,
            enable_gqa=enable_gqa,
        )
        output.copy_(attended.squeeze(2))
        return output

    def _run_sdpa_forward_extend(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        extend_prefix_lens: Tensor,
        extend_seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> Tensor:
        """New tokens [sum of extend_seq_lens, H, D] behind cached prefixes, written to `output`."""
        if encoder_lens is not None or sliding_window_size is not None or not causal:
            return super()._run_sdpa_forward_extend(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                extend_prefix_lens,
                extend_seq_lens,
                encoder_lens,
                scaling,
                enable_gqa,
                causal,
                is_cross_attn,
                sliding_window_size,
            )
        first = 0
        sizes = zip(
            req_pool_indices.tolist(),
            extend_prefix_lens.tolist(),
            extend_seq_lens.tolist(),
            strict=True,
        )
        for row, num_cached, num_new in sizes:
            slots = req_to_token[row, : num_cached + num_new]
            last = first + num_new
            # New token i sees the cached prefix and the new tokens up to itself.
            is_past = torch.ones(num_new, num_cached + num_new, dtype=torch.bool).tril(num_cached)
            attended = scaled_dot_product_attention(
                query[first:last].transpose(0, 1).unsqueeze(0),
                k_cache[slots].transpose(0, 1).unsqueeze(0).to(query.dtype),
                v_cache[slots].transpose(0, 1).unsqueeze(0).to(query.dtype),
                attn_mask=is_past,
                scale=scaling,
                enable_gqa=enable_gqa,
            )
            output[first:last] = attended.squeeze(0).transpose(0, 1)
            first = last
        return output


def register() -> None:
    """Make `--attention-backend torch_native` mean `BatchedCpuAttention` in this process."""

    @register_attention_backend("torch_native")
    def create(runner: Any) -> BatchedCpuAttention:
        return BatchedCpuAttention(runner)
