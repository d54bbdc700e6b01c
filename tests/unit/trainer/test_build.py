"""Proves where a push is not tried again, and where an engine is not started anew."""

from dataclasses import replace

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.config.train import ParallelConfig, WeightSyncConfig
from megatron_matpo.launch.roles import _restarts
from megatron_matpo.trainer.build import _retries

CONFIG = replace(Config(), weight_sync=WeightSyncConfig(retries=2))
SHARED = ClusterConfig(placement="colocated")
STAGES = ParallelConfig(pipeline=2)


@pytest.mark.parametrize(
    ("changes", "retries", "restarts"),
    [
        ({}, 2, 3),
        ({"cluster": SHARED}, 0, 0),
        ({"parallel": STAGES}, 2, 3),
        ({"weight_sync": WeightSyncConfig(retries=2, transport="none")}, 2, 0),
    ],
)
def test_what_cannot_be_mended_is_not_tried(changes, retries, restarts):
    config = replace(CONFIG, **changes)
    assert _retries(config) == retries
    assert _restarts(config).max_restarts == restarts
