"""The pipeline schedule: how much is in flight, and how long stages idle.

Source: Megatron-Core 0.16.1, `pipeline_parallel/schedules.py:get_pp_rank_microbatches` (warm-up of
1F1B, plain and interleaved); Narayanan et al. 2021 (arXiv:2104.04473), section 2.2, for the bubble.
"""

from __future__ import annotations

from megatron_matpo.planning.shape import Layout


def in_flight_chunks(layout: Layout, stage: int, num_micro_batches: int) -> int:
    """Forward passes of chunks whose activations a stage holds at its peak.

    The warm-up, and the one that is computed when the first backward pass begins.
    """
    if layout.pipeline == 1:
        return 1
    behind = layout.pipeline - 1 - stage
    interleaved = 2 * behind + (layout.virtual - 1) * layout.pipeline
    warm_up = behind if layout.virtual == 1 else interleaved
    return min(warm_up + 1, num_micro_batches * layout.virtual)


def bubble_frac(layout: Layout, num_micro_batches: int) -> float:
    """Share of an update in which a stage waits: (p - 1) / (v m + p - 1)."""
    idle = layout.pipeline - 1
    return idle / (layout.virtual * num_micro_batches + idle)
