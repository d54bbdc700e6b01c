"""Log-probs and entropies of labels from hidden states, without the logits of more than a chunk.

The distribution is softmax(hidden @ weight.T / temperature) over the real vocabulary, whose rows
are split over the tensor-parallel ranks. Output layer and softmax are one differentiable function
that goes through the tokens `chunk_tokens` at a time and keeps no logits: the backward pass makes
each chunk's again. Invariants:

* at most two float32 tensors of [chunk_tokens, V/tp] exist at a time, whatever n is (on a GPU in
  bfloat16 the backward pass adds one of bfloat16, and two float32 ones of the weight's size);
* logits are float32 sums of products, also with bfloat16 weights;
* communication does not grow with the number of chunks: one gather of 4 n floats in the forward
  pass, one sum of [n, h] in the backward pass.

Peak memory of the forward and backward pass above its inputs at V = 151,936, h = 16, tp = 1, as
resident memory of a process on a CPU (`tests/unit/megatron/test_logprobs.py` repeats this):

| tokens | chunk | peak, MiB | for comparison: float32 logits of all tokens, once, MiB |
|---|---|---|---|
| 64 | 16 | 19 | 37 |
| 256 | 32 | 37 | 148 |
| 1,024 | 32 | 37 | 594 |
| 1,024 | 128 | 149 | 594 |

Letters in shapes: n tokens, h hidden size, V vocabulary rounded up to a multiple of tp, v columns
of this rank that are no padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_NOTHING = -1e30
"""Peak of a rank that holds padding only: finite, so that 0 x its distance is 0."""


@dataclass(frozen=True)
class _Head:
    """The output layer on this rank, and how its tokens are cut."""

    num_valid: int
    """v."""
    width: int
    """V/tp."""
    rank: int
    temperature: float
    group: Any
    """Tensor-parallel group; None for one rank."""
    chunk_tokens: int
    sum_hidden_grad: bool

    def rows(self, n: int) -> Iterator[slice]:
        """Ranges of tokens; none where this rank holds padding only."""
        if self.num_valid:
            for start in range(0, n, self.chunk_tokens):
                yield slice(start, min(start + self.chunk_tokens, n))

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Float32 logits / temperature [rows, v], which the caller may overwrite."""
        logits = _product(hidden, weight[: self.num_valid].t())
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def columns_of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(this rank's column of each label, clamped into it [n]; whether it is there [n])."""
        column = labels - self.rank * self.width
        is_mine = (column >= 0) & (column < self.num_valid)
        return column.clamp(0, max(self.num_valid - 1, 0)), is_mine


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product of two matrices of one dtype, summed and returned in float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # CPUs have no such product


class _HeadLogprobs(torch.autograd.Function):
    """Chunks are functions of their own, so that one's tensors are gone when the next is made."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor]:
        n = hidden.shape[0]
        column, is_mine = head.columns_of(labels)
        # Of this rank's columns: largest logit; relative to it sum of exp, sum of exp * logit,
        # and the label's logit where it is here.
        local = torch.zeros(4, n, dtype=torch.float32, device=hidden.device)
        local[0] = _NOTHING
        for rows in head.rows(n):
            local[:, rows] = _reduce(head.logits(hidden[rows], weight), column[rows])
        local[3] *= is_mine
        logprobs, entropy, log_norm = _combine(local, labels // head.width, head.group)
        ctx.save_for_backward(hidden, weight, column, is_mine, log_norm)
        ctx.head = head
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        hidden, weight, column, is_mine, log_norm = ctx.saved_tensors
        head: _Head = ctx.head
        grad_hidden = torch.zeros_like(hidden)
        # Over many chunks, so not in the weight's own dtype.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad = grad.float() / head.temperature
        valid = slice(0, head.num_valid)
        for rows in head.rows(hidden.shape[0]):
            x = _grad_logits(
                head.logits(hidden[rows], weight),
                log_norm[rows, None],
                grad[rows, None],
                column[rows, None],
                is_mine[rows, None],
            ).to(weight.dtype)
            torch.mm(x, weight[valid], out=grad_hidden[rows])
            if weight.dtype == torch.float32:
                grad_weight[valid].addmm_(x.t(), hidden[rows])
            else:
                grad_weight[valid] += _product(x.t(), hidden[rows])
            del x
        if head.group is not None and head.sum_hidden_grad:
            dist.all_reduce(grad_hidden, group=head.group)
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _reduce(x: Tensor, column: Tensor) -> Tensor:
    """[rows, v] logits, overwritten -> [4, rows]: see `_combine`."""
    peak = x.amax(dim=-1)
    x.sub_(peak[:, None])
    label = x.gather(1, column[:, None]).squeeze(1)
    exp = x.exp()
    return torch.stack([peak, exp.sum(dim=-1), x.mul_(exp).sum(dim=-1), label])


def _grad_logits(
    x: Tensor, log_norm: Tensor, grad: Tensor, column: Tensor, is_mine: Tensor
) -> Tensor:
    """Gradient [rows, v] written over the logits: grad * (1[label] - softmax); others [rows, 1]."""
    x.sub_(log_norm).exp_().mul_(-grad)
    return x.scatter_add_(1, column, grad * is_mine)


def _combine(local: Tensor, owner: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and log of the norm [n] from every rank's part of the softmax.

    Args:
        local: [4, n] of this rank: peak; relative to it sum of exp, sum of exp * logit, label.
        owner: [n] rank in the group that has the label's column.
        group: tensor-parallel group; None for one rank.
    """
    if group is None:
        parts = local[None]
    else:
        parts = local.new_empty(dist.get_world_size(group), *local.shape)
        dist.all_gather(list(parts.unbind()), local, group=group)
    peak = parts[:, 0].amax(dim=0)
    # Everything stays relative to the peak, so that no two large numbers are subtracted.
    distance = parts[:, 0] - peak
    share = distance.exp()
    norm = (share * parts[:, 1]).sum(dim=0)
    weighted = (share * (parts[:, 2] + parts[:, 1] * distance)).sum(dim=0)
    label = (parts[:, 3] + distance).gather(0, owner[None]).squeeze(0)
    log_z = norm.log()
    return label - log_z, log_z - weighted / norm, peak + log_z


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: Any = None,
    chunk_tokens: int = 2048,
    sum_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each label, and the entropy of its distribution.

    All ranks of `tp_group` call with their own rows of the weight and the same hidden states and
    labels; all get the result. Gradients reach `hidden`, and `weight` once per call, so that
    Megatron's hooks see it like any other parameter's.

    Args:
        hidden: [n, h] float32 or bfloat16, of all n tokens: with sequence parallelism gathered.
        weight: [V/tp, h] in the dtype of `hidden`; rank r of the group holds rows
            r*V/tp .. (r+1)*V/tp - 1 of the output layer.
        labels: [n] int64 in 0 .. vocab_size-1.
        vocab_size: rows that exist; those at and beyond it are padding, without probability.
        temperature: what the engine sampled with.
        tp_group: tensor-parallel group; None for one rank.
        chunk_tokens: tokens whose logits exist at a time.
        sum_hidden_grad: sum the gradient of `hidden` over `tp_group`, as a column-parallel layer
            does. False where that is left to whoever gathered `hidden` (sequence parallelism's
            gather reduces and scatters it).

    Returns:
        Log-probs [n] float32, differentiable, and entropies [n] float32, without gradient. Both in
        nats.
    """
    assert hidden.dtype == weight.dtype, f"{hidden.dtype} hidden states, {weight.dtype} weights"
    size = 1 if tp_group is None else dist.get_world_size(tp_group)
    rank = 0 if tp_group is None else dist.get_rank(tp_group)
    width = weight.shape[0]
    head = _Head(
        num_valid=min(max(vocab_size - rank * width, 0), width),
        width=width,
        rank=rank,
        temperature=temperature,
        group=tp_group if size > 1 else None,
        chunk_tokens=chunk_tokens,
        sum_hidden_grad=sum_hidden_grad,
    )
    return _HeadLogprobs.apply(hidden, weight, labels, head)
