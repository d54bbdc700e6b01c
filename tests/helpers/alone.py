"""A generation on a simulated engine that has nothing else to do: a bound for all others."""

from __future__ import annotations

from megatron_matpo.simulation.engine import EngineRates, Segment


def alone_s(rates: EngineRates, context_tokens: int, num_tokens: int, new_tokens: int) -> float:
    """Seconds for `num_tokens` behind a context of which `new_tokens` are not in the cache."""
    pairs = new_tokens * (2 * context_tokens - new_tokens + 1) // 2
    decode = Segment(rates, 1, context_tokens + 1).seconds(num_tokens - 1)
    return rates.prefill_s(new_tokens, pairs) + decode
