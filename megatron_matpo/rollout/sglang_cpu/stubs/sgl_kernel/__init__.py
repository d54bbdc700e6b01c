"""Stand-in for SGLang's compiled CPU kernels, which no package index holds.

Holds what SGLang calls for a dense Qwen3 on a CPU without AMX instructions. Every other name that
SGLang looks up can be imported, and raises NotImplementedError with its name if it is called.
"""

from __future__ import annotations

from typing import Any


def assign_req_to_token_pool_cpu(
    req_pool_indices: Any,
    req_to_token: Any,
    start_offset: Any,
    end_offset: Any,
    out_cache_loc: Any,
    pool_len: int,
) -> None:
    """Write the cache slots of newly allocated tokens into the request table.

    Request i gets the next `end_offset[i] - start_offset[i]` entries of `out_cache_loc`, written
    to row `req_pool_indices[i]` of `req_to_token` from column `start_offset[i]` on.

    Args:
        req_pool_indices: [R] row of each request.
        req_to_token: [rows, pool_len] int32 table, changed in place.
        start_offset: [R] first column, inclusive.
        end_offset: [R] last column, exclusive.
        out_cache_loc: [sum of (end - start)] slots in request order.
        pool_len: row length of the table; unused, the tensor knows it.
    """
    starts, ends = start_offset.tolist(), end_offset.tolist()
    slots = out_cache_loc.to(req_to_token.dtype)
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), starts, ends, strict=True):
        req_to_token[row, start:end] = slots[taken : taken + end - start]
        taken += end - start


def __getattr__(name: str) -> Any:
    """Any kernel that is imported but not written here."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"sgl_kernel.{name} has no CPU stand-in; only dense models run on this CPU"
        )

    return missing
