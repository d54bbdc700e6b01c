"""Transport `ipc` from several trainer ranks, as on GPUs, with memory of the host.

Proved: every rank of every engine opens what the trainer rank on its device wrote, in several
buckets and pushes, and no buffer is written again before all engines are done with it.
"""

from __future__ import annotations

import pytest

from tests.helpers.ipc_ranks import push_twice

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("writers", [[(1, 0)], [(0,), (1,)], [(1,)]], ids=str)
def test_ranks_write_for_the_engine_ranks_on_their_devices(ranks, writers):
    engines, others = ranks.run(push_twice, 2, writers)
    assert others == []
    assert len(engines) == len(writers)
    for (version, held), own in zip(engines, writers, strict=True):
        assert version == "2"
        assert held == {
            f"{rank} w{i}": [10.0 * i + writer] * 4
            for i in range(5)
            for rank, writer in enumerate(own)
        }
