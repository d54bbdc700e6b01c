"""How the metrics of several updates become one line."""

import pytest

from megatron_matpo.megatron.actor import UpdateResult
from megatron_matpo.trainer.learner import _combine


def test_mismatch_is_of_the_first_update_and_the_rest_are_means():
    first = UpdateResult(0.0, 1.0, 0.1, {"mismatch/max": 0.5, "loss/policy": 2.0})
    second = UpdateResult(0.0, 3.0, 0.2, {"mismatch/max": 9.0, "loss/policy": 4.0})
    combined = _combine([first, second])
    assert combined["mismatch/max"] == 0.5
    assert combined["loss/policy"] == pytest.approx(3.0)
    assert combined["optim/grad_norm"] == pytest.approx(2.0)
    assert combined["optim/lr"] == 0.2
