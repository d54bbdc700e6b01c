"""Log-probs and entropies of labels from logits that are split over the vocabulary.

The distribution is softmax(logits / temperature) over the real vocabulary. Letters in shapes:
n tokens, V vocabulary rounded up to a multiple of tp.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Chunks:
    """Row ranges of [n, V/tp] logits, turned into scaled float32 logits one range at a time."""

    def __init__(self, logits: Tensor, num_valid: int, inverse_temperature: float, rows: int):
        self._logits, self._num_valid = logits, num_valid
        self._scale, self._rows = inverse_temperature, rows

    def __iter__(self) -> Any:
        """Yields (slice, float32 [rows, num_valid] that the caller may overwrite)."""
        for start in range(0, self._logits.shape[0], self._rows):
            rows = slice(start, min(start + self._rows, self._logits.shape[0]))
            part = self._logits[rows, : self._num_valid]
            if self._scale == 1.0:
                yield rows, part.to(torch.float32, copy=True)
            else:
                yield rows, part.to(torch.float32) * self._scale


class _VocabParallelLogprobs(torch.autograd.Function):
    """Two collectives whatever the number of chunks: the maximum, then the sums."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        local_labels: Tensor,
        num_valid: int,
        temperature: float,
        group: Any,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        n = logits.shape[0]
        chunks = _Chunks(logits, num_valid, 1.0 / temperature, chunk_tokens)
        if num_valid:
            peak = logits[:, :num_valid].amax(dim=-1).float() * (1.0 / temperature)
        else:
            peak = logits.new_full((n,), float("-inf"), dtype=torch.float32)
        if group is not None:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        # Rows: sum of exp, sum of exp * x, x of the label (from the rank that owns it).
        sums = torch.zeros(3, n, dtype=torch.float32, device=logits.device)
        mine = (local_labels >= 0) & (local_labels < num_valid)
        column = local_labels.clamp(0, max(num_valid - 1, 0)).unsqueeze(1)
        for rows, x in chunks if num_valid else ():
            x.sub_(peak[rows, None])
            sums[2, rows] = x.gather(1, column[rows]).squeeze(1) * mine[rows]
            exp = x.exp()
            sums[0, rows] = exp.sum(dim=-1)
            sums[1, rows] = exp.mul_(x).sum(dim=-1)
        if group is not None:
            dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
        log_z = sums[0].log()
        ctx.save_for_backward(logits, column, mine, peak + log_z)
        ctx.num_valid, ctx.temperature, ctx.chunk_tokens = num_valid, temperature, chunk_tokens
        entropy = log_z - sums[1] / sums[0]
        ctx.mark_non_differentiable(entropy)
        return sums[2] - log_z, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        """D logprob / d logit = (1[label] - softmax) / temperature, written over the logits.

        The logits come out of a matrix product, whose own backward does not read them.
        """
        logits, column, mine, log_norm = ctx.saved_tensors
        scale = 1.0 / ctx.temperature
        scaled_grad = grad.float() * scale
        for rows, x in _Chunks(logits, ctx.num_valid, scale, ctx.chunk_tokens):
            x.sub_(log_norm[rows, None]).exp_().mul_(-scaled_grad[rows, None])
            if ctx.num_valid:
                x.scatter_add_(1, column[rows], (scaled_grad[rows] * mine[rows]).unsqueeze(1))
            logits[rows, : ctx.num_valid] = x
        logits[:, ctx.num_valid :] = 0
        return logits, None, None, None, None, None


def vocab_parallel_logprobs(
    logits_local: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: Any = None,
    chunk_tokens: int = 2048,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each label, and the entropy of its distribution.

    All ranks of `tp_group` call with their own columns and the same labels; all get the result.
    At most `chunk_tokens` rows of float32 logits exist besides `logits_local`. The backward pass
    writes the gradient over `logits_local`: do not read it afterwards, and do not go back twice.

    Args:
        logits_local: [..., V/tp] float32 or bfloat16; rank r of the group holds columns
            r*V/tp .. (r+1)*V/tp - 1.
        labels: [...] int64 in 0 .. vocab_size-1.
        vocab_size: columns that exist; those at and beyond it are padding, without probability.
        temperature: what the engine sampled with.
        tp_group: tensor-parallel group; None for one rank.
        chunk_tokens: rows at a time.

    Returns:
        Log-probs [...] float32, differentiable with respect to the logits, and entropies [...]
        float32, without gradient. Both in nats.
    """
    size = 1 if tp_group is None else dist.get_world_size(tp_group)
    rank = 0 if tp_group is None else dist.get_rank(tp_group)
    width = logits_local.shape[-1]
    num_valid = min(max(vocab_size - rank * width, 0), width)
    logprobs, entropy = _VocabParallelLogprobs.apply(
        logits_local.reshape(-1, width),
        labels.reshape(-1) - rank * width,
        num_valid,
        temperature,
        tp_group if size > 1 else None,
        chunk_tokens,
    )
    return logprobs.view(labels.shape), entropy.view(labels.shape)
