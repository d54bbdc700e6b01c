"""How fast a step trained: tokens, operations, and the share of the devices' peak (MFU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_matpo.config import Config
from megatron_matpo.config.flops import Shape, training_flops
from megatron_matpo.config.gpus import peak_flops
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.data.schedule import num_trained_tokens
from megatron_matpo.types import Role, TrainSample


@dataclass(frozen=True)
class Throughput:
    """What the rates of a run are relative to."""

    shape: Shape
    num_devices: int
    peak_flops: float
    """Of one device; 0 if unknown: no MFU then."""

    @classmethod
    def of(cls, config: Config) -> Throughput:
        """Of the trainer's model, ranks and devices; the device is asked for its name."""
        peak = config.train.peak_tflops * 1e12
        if peak == 0 and config.cluster.device == "cuda":
            is_fp8 = config.precision == "fp8"
            peak = peak_flops(torch.cuda.get_device_name(), is_fp8=is_fp8)
        shape = Shape.of(HfModelConfig.from_folder(config.model.path))
        return cls(shape, config.parallel.world_size, peak)

    def metrics(self, samples: Sequence[TrainSample], train_s: float) -> dict[str, float]:
        """Of a step whose updates saw each of `samples` once and took `train_s`.

        Scoring passes are neither in the time nor in the operations.
        """
        lengths = [len(sample.input_ids) for sample in samples]
        flops = training_flops(self.shape, lengths, num_trained_tokens(samples))
        per_device = flops / max(train_s, 1e-9) / self.num_devices
        values = {
            "train/tokens_per_s": sum(lengths) / max(train_s, 1e-9),
            "train/tflops_per_device": per_device / 1e12,
        }
        for role in Role:
            values[f"tokens/trained/{role}"] = num_trained_tokens(
                [sample for sample in samples if sample.role is role]
            )
        return values | ({"train/mfu": per_device / self.peak_flops} if self.peak_flops else {})
