"""Ranks that wait for each other in vain, and what is left of ranks that have met."""

import pytest

from megatron_matpo.errors import DeadlineError
from megatron_matpo.megatron.parallel import init_parallel
from tests.helpers.dist import free_port
from tests.helpers.megatron_ranks import num_threads, scores_and_update
from tests.helpers.tiny import make_batch, make_tiny_model, tiny_config

pytestmark = pytest.mark.dist


def test_ranks_that_do_not_meet_are_a_named_error(tmp_path):
    """In this process, which is no rank of anything."""
    config = tiny_config(tmp_path, dp=2, timeout_s=1.0)
    with pytest.raises(DeadlineError, match=r"did not meet .* within train\.timeout_s=1"):
        init_parallel(config, rank=0, world_size=2, master_port=free_port())


def test_threads_of_a_layout_end_with_it(ranks, tmp_path):
    """Each of its process groups has three, some of them dozens."""
    config = tiny_config(make_tiny_model(tmp_path / "model", tied=True), tp=2)
    left = []
    for _ in range(3):
        ranks.run(scores_and_update, 2, config, [make_batch((2, 8), 0)])
        left.append(ranks.run(num_threads, 2))
    assert left[0] == left[1] == left[2]
    assert max(left[0]) < 20
