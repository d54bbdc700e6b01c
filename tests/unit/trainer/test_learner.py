"""How the metrics of several updates become one line."""

import pytest

from megatron_matpo.algo.token_metrics import with_sample_sizes
from megatron_matpo.megatron.actor import UpdateResult
from megatron_matpo.trainer.learner import _combine


def test_shares_add_up_losses_are_averaged_and_maxima_stay():
    first = UpdateResult(
        0.0, 1.0, 0.1, {"mismatch/max": 9.0, "mismatch/k3": 0.25, "loss/policy": 2.0}
    )
    second = UpdateResult(
        0.0, 3.0, 0.2, {"mismatch/max": 0.5, "policy/entropy": 0.5, "loss/policy": 4.0}
    )
    combined = _combine([first, second])
    assert combined == {
        "mismatch/max": 9.0,
        # Only the first update could measure it.
        "mismatch/k3": 0.25,
        "policy/entropy": 0.5,
        "loss/policy": pytest.approx(3.0),
        "optim/grad_norm": pytest.approx(2.0),
        "optim/lr": 0.2,
    }


def test_effective_sample_size_takes_the_place_of_the_mean_square():
    metrics = with_sample_sizes(
        {
            "policy/tis_weight/planner": 0.5,
            "policy/tis_weight_squared/planner": 0.5,
            "policy/tis_weight/worker": 0.0,
            "policy/tis_weight_squared/worker": 0.0,
        }
    )
    # Half of the weights 1, half 0: as good as half of the tokens.
    assert metrics["policy/tis_ess/planner"] == pytest.approx(0.5)
    assert metrics["policy/tis_ess/worker"] == 0.0
    assert not any("squared" in name for name in metrics)
