"""A resumed run's KL reference is the initial model, not the checkpoint's; without a penalty none.

The real actor in one process; layouts are in tests/dist/test_reference_model.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.parallel import destroy_parallel, init_parallel
from megatron_matpo.obs.status import PhaseWriter
from megatron_matpo.trainer.clock import Clock
from megatron_matpo.trainer.run import Progress, load_progress, save_progress
from tests.helpers.dist import free_port
from tests.helpers.tiny import make_batch, make_tiny_model, tiny_config, weighted_loss


@pytest.fixture
def make_actor(tmp_path):
    config = tiny_config(make_tiny_model(tmp_path / "model", tied=True))
    state = init_parallel(config, rank=0, world_size=1, master_port=free_port())
    yield lambda: MegatronActor(config, HfModelConfig.from_folder(config.model.path), state)
    destroy_parallel()


def test_the_reference_of_a_resumed_run_is_the_initial_model(make_actor, tmp_path):
    clock = Clock(PhaseWriter(tmp_path, "trainer", 0))
    batch = make_batch((2, 6), 0)
    first = make_actor()
    assert load_progress(first, tmp_path, clock, has_reference=True) == Progress()
    ((initial, _),) = first.score([batch])
    first.update([batch], weighted_loss, 0)
    progress = replace(Progress(), step=1, policy_version=1, num_updates=1)
    save_progress(first, tmp_path, progress, clock)
    first.finish_save()

    resumed = make_actor()
    assert load_progress(resumed, tmp_path, clock, has_reference=True) == progress
    assert torch.equal(resumed.score_reference([batch])[0][0], initial)
    assert torch.equal(resumed.score([batch])[0][0], first.score([batch])[0][0])
    assert not torch.equal(resumed.score([batch])[0][0], initial)

    plain = make_actor()
    assert load_progress(plain, tmp_path, clock) == progress
    with pytest.raises(AssertionError, match="load_reference"):
        plain.score_reference([batch])
