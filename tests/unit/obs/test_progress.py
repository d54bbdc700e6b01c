"""The live line is a pure function of the step's metrics."""

from __future__ import annotations

import pytest

from megatron_matpo.obs.progress import eta_s, format_duration, format_progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (6.6, "0:07"), (130, "2:10"), (3723, "1:02:03"), (273_900, "3d 04:05")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_eta_uses_the_recent_steps() -> None:
    assert eta_s(3, 10, [100.0, 2.0, 4.0], window=2) == 21.0
    assert eta_s(0, 10, []) == 0.0
    assert eta_s(12, 10, [1.0]) == 0.0


def test_full_line() -> None:
    line = format_progress(
        12,
        40,
        {
            "time/rollout_s": 3.1,
            "time/score_s": 0.0,
            "time/train_s": 1.2,
            "time/sync_s": 0.2,
            "time/step_s": 4.5,
            "reward/total": 0.62,
            "reward/accuracy": 0.6,
            "tokens/sampled": 3654,
            "mismatch/abs_logprob": 3.1e-7,
        },
        eta=130.0,
    )
    assert line == (
        "step 12/40 | rollout 3.1s train 1.2s sync 0.2s | reward 0.62 acc 0.60 | 812 tok/s"
        " | mismatch 3e-7 | ETA 2:10"
    )


def test_means_of_evaluations_are_shown_without_their_intervals() -> None:
    values = {"eval/gaia/mean@8": 0.415, "eval/gaia/mean@8/low": 0.3, "eval/gaia/best@8": 0.7}
    assert format_progress(1, 2, values) == "step 1/2 | gaia mean@8 0.41"
    assert format_progress(0, 2, {"eval/gaia/mean@8": None}) == "step 0/2"


def test_missing_and_null_parts_are_left_out() -> None:
    assert format_progress(1, 2, {"reward/total": None}) == "step 1/2"
    assert format_progress(1, 2, {"mismatch/abs_logprob": 0.0123}) == "step 1/2 | mismatch 0.012"
