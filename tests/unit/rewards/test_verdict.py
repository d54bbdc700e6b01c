"""Proves which replies of a judge are verdicts, and what it is asked."""

from __future__ import annotations

import pytest

from megatron_matpo.rewards.verdict import (
    MAX_ANSWER_CHARS,
    Verdict,
    judge_prompt,
    parse_verdict,
    reminder,
)

CORRECT, INCORRECT, NOT_ATTEMPTED = Verdict


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("A", CORRECT),
        ("B", INCORRECT),
        ("C", NOT_ATTEMPTED),
        (" A\n", CORRECT),
        ("A.", CORRECT),
        ("(A)", CORRECT),
        ("[B]", INCORRECT),
        ("**B**", INCORRECT),
        ("`C`", NOT_ATTEMPTED),
        ('"A"', CORRECT),
        ("A: CORRECT", CORRECT),
        ("A = correct", CORRECT),
        ("**A**: CORRECT", CORRECT),
        ("A (CORRECT)", CORRECT),
        ("C - Not attempted.", NOT_ATTEMPTED),
        ("CORRECT", CORRECT),  # MATPO original: matches the letter C and scores 0 (defect C9)
        ("Incorrect", INCORRECT),
        ("NOT_ATTEMPTED", NOT_ATTEMPTED),
        ("not attempted", NOT_ATTEMPTED),
        ("Answer: C", NOT_ATTEMPTED),
        ("## Final grade: **B**", INCORRECT),
        ("Verdict: INCORRECT!", INCORRECT),
        ("<think>B or C? The dates differ, so A is out.</think>\n\nB", INCORRECT),
        ("it is plainly right</think>A", CORRECT),
        ("", None),
        ("   ", None),
        ("A or B", None),
        ("A B", None),
        ("(A) (B)", None),
        ("A\nB", None),
        ("AC", None),
        ("a", None),
        ("D", None),
        ("A: INCORRECT", None),
        ("B: CORRECT", None),
        ("CORRECT INCORRECT", None),
        ("not correct", None),
        ("A correct answer would name Uppsala", None),
        ("I think A", None),
        ("A, because the city is right", None),
        ("The answer is B", None),
        ("<think>A", None),
        ("<think>A</think>", None),
        ("Because", None),
        ("Apologies, I cannot grade this.", None),
        ("\u0410", None),  # the Cyrillic letter
        ("A" * 100_000, None),
    ],
)
def test_strict_grammar(reply: str, expected: Verdict | None) -> None:
    assert parse_verdict(reply) is expected


def test_the_prompt_holds_the_three_texts_as_they_are() -> None:
    prompt = judge_prompt("Who {truth}?", "Ada {answer}", "Bob %s {0}")
    for line in (
        "Question: Who {truth}?\n",
        "Gold target: Ada {answer}\n",
        "Predicted answer: Bob %s {0}\n",
    ):
        assert line in prompt
    for grade in ("A: CORRECT", "B: INCORRECT", "C: NOT_ATTEMPTED", "last significant figure"):
        assert grade in prompt
    assert prompt.endswith("C for NOT_ATTEMPTED.") and reminder().endswith("C for NOT_ATTEMPTED.")


def test_a_far_too_long_answer_is_cut_visibly() -> None:
    prompt = judge_prompt("Who?", "Ada", "x" * 100_000)
    assert "x" * MAX_ANSWER_CHARS + " [... cut: 100000 characters in all]" in prompt
    assert len(prompt) < 8000
