"""Floating-point operations of a training step. Pure arithmetic; peaks are in `gpus.py`.

Counted: the two operations of every multiply-add in matrix products, embedding look-up, norms and
softmax not. Forward pass of a sequence of s tokens, n of which are trained, with L layers, hidden
size h, a = heads x head_dim, k = kv_heads x head_dim, V vocabulary:

    L s (2 h (a + 2 k) + 2 a h)           query, key, value; output projection
  + L (4 a) s (s + 1) / 2                 query x key and softmax x value, causal: half the square
  + L s 6 h f                             gated feed-forward: three matrices h x f
  + n 2 h V                               output layer, which runs for trained tokens only

In a layer with experts f is experts_per_token x expert_size + shared_size, and the router adds
2 h E per token. Training is three times that (the backward pass differentiates each product with
respect to both factors). Recomputed activations are not counted: they are no progress (the "model
FLOPs" of arXiv:2205.05198, Appendix A, and arXiv:2204.02311, Appendix B; these count attention
without the causal half, so their MFU is larger).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_matpo.config.hf_model import HfModelConfig

_BACKWARD_AND_FORWARD = 3


@dataclass(frozen=True)
class Shape:
    """Sizes that decide the number of operations."""

    num_layers: int
    hidden_size: int
    query_size: int
    """Heads x head dimension."""
    kv_size: int
    """Key/value heads x head dimension."""
    ffn_size: int
    """Of the layers without experts."""
    vocab_size: int
    num_expert_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    """Feed-forward channels of one expert."""
    shared_size: int = 0
    """Feed-forward channels of the experts that see every token."""

    @classmethod
    def of(cls, hf: HfModelConfig) -> Shape:
        """Of a decoder, dense or with experts."""
        moe = hf.moe
        return cls(
            num_layers=hf.num_layers,
            hidden_size=hf.hidden_size,
            query_size=hf.num_heads * hf.head_dim,
            kv_size=hf.num_kv_heads * hf.head_dim,
            ffn_size=hf.ffn_size,
            vocab_size=hf.vocab_size,
            num_expert_layers=sum(moe.layers) if moe else 0,
            num_experts=moe.num_experts if moe else 0,
            experts_per_token=moe.experts_per_token if moe else 0,
            expert_size=moe.ffn_size if moe else 0,
        )

    @property
    def per_token(self) -> int:
        """Operations of all layers for one token, without attention's and the output layer's."""
        h = self.hidden_size
        projections = 2 * h * (self.query_size + 2 * self.kv_size) + 2 * self.query_size * h
        expert_ffn = self.experts_per_token * self.expert_size + self.shared_size
        dense = (self.num_layers - self.num_expert_layers) * 6 * h * self.ffn_size
        experts = self.num_expert_layers * (6 * h * expert_ffn + 2 * h * self.num_experts)
        return self.num_layers * projections + dense + experts

    @property
    def per_pair(self) -> int:
        """Operations of all layers for one query with one key."""
        return 4 * self.query_size * self.num_layers


def forward_flops(shape: Shape, lengths: Sequence[int], num_trained: int) -> int:
    """Of one forward pass over sequences of `lengths` tokens, `num_trained` of them in the loss."""
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    layers = shape.per_token * sum(lengths) + shape.per_pair * pairs
    return layers + 2 * shape.hidden_size * shape.vocab_size * num_trained


def training_flops(shape: Shape, lengths: Sequence[int], num_trained: int) -> int:
    """Of forward and backward pass, recomputation left out."""
    return _BACKWARD_AND_FORWARD * forward_flops(shape, lengths, num_trained)
