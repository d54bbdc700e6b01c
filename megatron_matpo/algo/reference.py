"""Advantages as the original MATPO code computed them (`compat: reference`), defects included.

Source: MATPO `verl/trainer/ppo/core_algos.py:168-221` and `verl/protocol.py:1287-1288`; defects C1
and C11 of docs/algorithm.md. What a token gets from it is in `data/samples.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_matpo.algo.advantages import STD_EPSILON


def reference_group_advantages(rewards: Sequence[float], *, normalize_std: bool) -> list[float]:
    """Advantages of one prompt group in float32, with the original's order of operations.

    Equal rewards whose float32 mean is not the reward itself get values that are not 0 (eight times
    0.95: +0.056). A single episode has mean 0 and standard deviation 1, so it gets its reward.
    """
    scores = torch.tensor(list(rewards), dtype=torch.float32)
    if len(rewards) < 2:
        mean, std = torch.tensor(0.0), torch.tensor(1.0)
    else:
        mean, std = scores.mean(), scores.std()
    centered = scores - mean
    return [float(value) for value in centered / (std + STD_EPSILON if normalize_std else 1.0)]
