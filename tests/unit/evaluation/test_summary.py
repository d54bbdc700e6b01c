"""Proves that the figures of a set are those of its questions, with an oracle written by hand.

Copies of a row and samples of a row are pooled; failures count nowhere; ours and the paper's
figures are told apart. The statistics themselves are proved in test_stats.py.
"""

from __future__ import annotations

import json
import math
from itertools import combinations

import pytest

from megatron_matpo.config.evaluation import EvalConfig
from megatron_matpo.evaluation.paper import paper_score
from megatron_matpo.evaluation.summary import metrics, summarize
from megatron_matpo.evaluation.table import Report, to_json, to_text
from megatron_matpo.obs.metrics import spec_of
from tests.helpers.evaluation import result

CONFIG = EvalConfig(num_resamples=200)


def values(summary) -> dict[str, float]:
    return {name: item.value for name, item in summary.measures.items()}


def test_copies_of_a_row_and_samples_of_a_row_are_one_question():
    """Two copies with two samples each: n = 4, whatever the order of the results."""
    right = {(0, 0): 1.0, (0, 1): 0.0, (1, 0): 0.0, (1, 1): 0.0}  # rows 0 and 1 are copies
    results = [
        result(row, sample, accuracy, question_key="a", answer="x" if accuracy else f"y{row}")
        for (row, sample), accuracy in right.items()
    ]
    results += [result(2, i, 1.0, question_key="b") for i in range(4)]
    summary = summarize("set", results[::-1], CONFIG, seed=1)
    assert (summary.num_questions, summary.num_samples, summary.num_episodes) == (2, 4, 8)
    assert values(summary) == pytest.approx(
        {
            "mean@4": (1 / 4 + 1) / 2,
            "best@2": (3 / 6 + 1) / 2,  # 3 of 6 pairs hold the right one
            "best@4": 1.0,
            # Pairs: (x, y0) and (x, y1) twice tie, so half each; y1 y1 and y0 y1 are wrong.
            "maj@2": (3 * 0.5 / 6 + 1) / 2,
            "maj@4": (0.0 + 1) / 2,  # y1 has two votes
        }
    )


def test_answers_are_counted_by_their_normalised_text_and_silence_is_no_vote():
    answers = ["The Beatles", "beatles.", "Stones", ""]
    accuracies = [1.0, 1.0, 0.0, 0.0]
    results = [
        result(0, i, accuracy, answer=answer)
        for i, (answer, accuracy) in enumerate(zip(answers, accuracies, strict=True))
    ]
    summary = summarize("set", results, CONFIG, seed=1)
    assert values(summary)["maj@4"] == 1.0
    assert summary.answered == 0.75

    def winner(chosen):
        votes = [0 if i < 2 else i for i in chosen if i < 3]
        if not votes:
            return 0.0
        most = max(votes.count(vote) for vote in votes)
        tied = [vote for vote in set(votes) if votes.count(vote) == most]
        return sum(vote == 0 for vote in tied) / len(tied)

    pairs = [winner(chosen) for chosen in combinations(range(4), 2)]
    assert values(summary)["maj@2"] == pytest.approx(sum(pairs) / len(pairs))


def test_failures_are_missing_and_never_wrong():
    results = [result(0, i, accuracy) for i, accuracy in enumerate((1.0, 1.0, None))]
    results += [result(1, i, None) for i in range(3)]
    results += [result(2, i, 0.0, answer="") for i in range(3)]
    summary = summarize("set", results, CONFIG, seed=1)
    assert (summary.num_episodes, summary.num_missing) == (9, 4)
    assert summary.failures == {"tool_failure: gone": 4}
    # Question 0 is right with both samples that came, question 1 is not known, question 2 wrong.
    assert values(summary) == pytest.approx(
        {"mean@3": 0.5, "best@2": 0.5, "maj@2": 0.5, "best@3": 0.0, "maj@3": 0.0}
    )
    assert summary.measures["best@3"].num_questions == 1, "only questions with three samples"
    assert summary.num_questions == 3


def test_a_set_of_which_nothing_came_has_no_figures_but_counts():
    summary = summarize("set", [result(0, 0, None)], CONFIG, seed=1)
    assert math.isnan(summary.mean.value)
    assert metrics(summary)["eval/set/failed"] == 1
    content = json.loads(to_json(report(summary)))
    assert content["sets"]["set"]["measures"]["mean@1"]["value"] is None
    assert "1 episodes are missing" in to_text(report(summary))


def test_breakdowns_by_level_type_and_source():
    results = [
        result(0, 0, 1.0, level="1", question_type="count | time"),
        result(1, 0, 0.0, level="1", question_type="time", data_source="other"),
        result(2, 0, 0.0, level="2", question_type=""),
    ]
    summary = summarize("set", results, CONFIG, seed=1)
    found = {
        name: {value: (item.value, item.num_questions) for value, item in part.items()}
        for name, part in summary.breakdowns.items()
    }
    assert found == {
        "level": {"1": (0.5, 2), "2": (0.0, 1)},
        "type": {"count": (1.0, 1), "time": (0.5, 2), "(none)": (0.0, 1)},
        "data_source": {"world": (0.5, 2), "other": (0.0, 1)},
    }
    plain = summarize("set", [result(0), result(1)], CONFIG, seed=1)
    assert plain.breakdowns == {}, "one level, type and source: nothing to break down"


def test_workers_tokens_and_statuses_are_means_over_scored_episodes():
    results = [
        result(0, 0, 1.0, worker_statuses={"answered": 2, "overflow": 1}, context_tokens=300),
        result(1, 0, 0.0, status="max_turns", sampled_tokens=30, duration_s=3.0),
        result(2, 0, None, worker_statuses={"answered": 9}, context_tokens=9999),
    ]
    summary = summarize("set", results, CONFIG, seed=1)
    assert (summary.workers, summary.context_tokens, summary.sampled_tokens) == (1.5, 200, 20)
    assert summary.planner_statuses == {"answered": 0.5, "max_turns": 0.5}
    assert summary.worker_statuses == pytest.approx({"answered": 2 / 3, "overflow": 1 / 3})
    assert summary.duration_s == 2.0


def test_every_metric_is_registered_by_its_own_entry():
    names = metrics(summarize("gaia", [result(0, i) for i in range(8)], CONFIG, seed=1))
    assert "eval/gaia/mean@8" in names and "eval/gaia/maj@4" in names
    assert spec_of("eval/gaia/mean@8/low").name == "eval/*/mean@*/low"
    assert spec_of("eval/gaia/best@8").name == "eval/*/best@*"
    assert all(spec_of(name).name.startswith("eval/") for name in names)


def report(*summaries, **fields) -> Report:
    return Report("model", 0.95, summaries, **({"has_mixed_settings": False} | fields))


@pytest.mark.parametrize(
    ("name", "sources", "benchmark"),
    [
        ("matpo_val_gaia_repeat_8", ["x"], "GAIA-text"),
        ("single_agent_val_webwalkerqa_repeat_2", ["x"], "WebWalkerQA"),
        ("matpo_val_frames_repeat_2", ["x"], "FRAMES"),
        ("mine", ["gaia_text_103_test_repeat8"], "GAIA-text"),
        ("mine", ["gaia_text_103_test", "musique"], None),
        ("mine", ["gaia"], None),  # the whole of GAIA is another benchmark
        ("matpo_train_musique", ["frames"], None),
        ("matpo_eval", ["smallworld"], None),
        ("mine", [], None),
    ],
)
def test_which_sets_have_figures_in_the_paper(name, sources, benchmark):
    score = paper_score(name, sources)
    assert (score and score.benchmark) == benchmark


def test_the_papers_figures_stand_beside_ours_and_are_marked():
    name = "matpo_val_gaia_repeat_8"
    results = [result(i, 0, float(i < 2), question_key=f"q{i // 8}") for i in range(8)]
    text = to_text(report(summarize(name, results, CONFIG, seed=1)))
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:3] == ["mean@8", "25.00"]
    assert cells[-4:] == ["42.60", "-17.60", "32.16", "-7.16"]
    assert "MATPO (theirs)" in text and "not measured here" in text
    assert "not the paper's GAIA-text measurement: 1 questions here, 103 there" in text
    content = json.loads(to_json(report(summarize(name, results, CONFIG, seed=1))))
    assert content["sets"][name]["paper"]["matpo"] == 42.6
    assert content["sets"][name]["measures"]["mean@8"]["value"] == 0.25


def test_sets_that_the_paper_does_not_have_get_no_columns():
    text = to_text(report(summarize("matpo_eval", [result()], CONFIG, seed=1)))
    assert "theirs" not in text and "arXiv" not in text


def test_mixed_results_are_told():
    summary = summarize("set", [result()], CONFIG, seed=1)
    assert "--accept-changes" in to_text(report(summary, has_mixed_settings=True))
    assert "--accept-changes" not in to_text(report(summary))
