"""The wire form keeps every field; damage is reported, never executed."""

import pytest

from megatron_matpo.errors import DataError
from megatron_matpo.wire import decode, encode
from tests.helpers.episodes import make_batch


@pytest.mark.parametrize("seed", range(5))
def test_round_trip_is_exact(seed):
    batch = make_batch(seed)
    assert decode(encode(batch)) == batch


@pytest.mark.parametrize("cut", [0, 5, 12, 40, -1])
def test_truncated_bytes_are_refused(cut):
    data = encode(make_batch(0))
    with pytest.raises(DataError, match="somewhere"):
        decode(data[:cut], "somewhere")


def test_foreign_file_is_refused():
    with pytest.raises(DataError, match="not a recorded rollout"):
        decode(b"\x80\x04pickle me if you can" * 10)
