"""Ranks that wait for each other in vain. In this process, which is no rank of anything."""

import pytest

from megatron_matpo.errors import DeadlineError
from megatron_matpo.megatron.parallel import init_parallel
from tests.helpers.dist import free_port
from tests.helpers.tiny import tiny_config


def test_ranks_that_do_not_meet_are_a_named_error(tmp_path):
    config = tiny_config(tmp_path, dp=2, timeout_s=1.0)
    with pytest.raises(DeadlineError, match=r"did not meet .* within train\.timeout_s=1"):
        init_parallel(config, rank=0, world_size=2, master_port=free_port())
