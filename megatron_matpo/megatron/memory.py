"""A run's peak of GPU memory beside what the plan said. Only where there is CUDA."""

from __future__ import annotations

import torch

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron.precision import resolve_precision
from megatron_matpo.planning.ledger import stage_ledger
from megatron_matpo.planning.shape import job_of

_GIB = 2**30


class PeakMemory:
    """Peaks of this rank between two readings; no rank waits for another."""

    def __init__(self, config: Config, stage: int) -> None:
        """Keep what the prediction needs; `stage` is this rank's pipeline stage."""
        self._config, self._stage = config, stage

    def metrics(self, num_micro_batches: int) -> dict[str, float]:
        """`memory/peak_gib` since the last call, and `memory/plan_gib`; empty on a CPU.

        The prediction is without its reserve, which stands for what torch's allocator does not
        count.

        Args:
            num_micro_batches: of the largest update since the last call.
        """
        if self._config.cluster.device == "cpu":
            return {}
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        hf = HfModelConfig.from_folder(self._config.model.path)
        job = job_of(self._config, hf, resolve_precision(self._config))
        ledger = stage_ledger(job, self._stage, num_micro_batches)
        return {
            "memory/peak_gib": peak / _GIB,
            "memory/plan_gib": (ledger.total - ledger.reserve) / _GIB,
        }
