"""Graders: is this answer the ground truth? Pure functions of two texts, by name.

Source: `exact_match` and `f1` normalise as SQuAD's evaluation does (Rajpurkar et al. 2016: lower
case, no punctuation, no articles, single spaces). Differs: Unicode is folded first (NFKC), LaTeX
text commands are unwrapped, and punctuation is whatever Unicode says it is. MATPO asks an LLM judge
instead; that is a service, these need none.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable

from megatron_matpo.errors import ConfigError

Grader = Callable[[str, str], float]
"""(answer, ground truth) -> accuracy in [0, 1]."""

_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit)\s*\{([^{}]*)\}")
_MINUS = re.compile(r"(?<![\w)])[-\u2212](?=\d)")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
# Relative tolerance of `numeric`: absorbs decimal rounding, not a wrong last digit.
_REL_TOL = 1e-6


def normalize(text: str) -> str:
    """Text as `exact_match` compares it."""
    text = unicodedata.normalize("NFKC", _LATEX_TEXT.sub(r"\1", text)).casefold()
    # A minus sign before a digit is part of the number; all other symbols are not compared.
    text = _MINUS.sub("minus ", text)
    letters = (" " if unicodedata.category(char)[0] in "PSZC" else char for char in text)
    plain = " ".join("".join(letters).split())
    # A text of nothing but articles or symbols stays as it is, or "A" would equal "The".
    return " ".join(_ARTICLES.sub(" ", plain).split()) or plain or text.strip()


def exact_match(answer: str, truth: str) -> float:
    """1 if both are equal after normalisation, else 0."""
    return float(normalize(answer) == normalize(truth))


def f1(answer: str, truth: str) -> float:
    """F1 of the words of both after normalisation, in [0, 1]."""
    got, expected = normalize(answer).split(), normalize(truth).split()
    shared = sum((Counter(got) & Counter(expected)).values())
    return 2 * shared / (len(got) + len(expected)) if shared else 0.0


def numeric(answer: str, truth: str) -> float:
    """1 if both hold exactly one number and it is the same (to 1e-6, relative), else 0.

    Thousands separators and surrounding text such as units are ignored.
    """
    got, expected = _only_number(answer), _only_number(truth)
    if got is None or expected is None:
        return 0.0
    return float(math.isclose(got, expected, rel_tol=_REL_TOL, abs_tol=0.0))


def _only_number(text: str) -> float | None:
    found = _NUMBER.findall(unicodedata.normalize("NFKC", text).replace("\u2212", "-"))
    if len(found) != 1:
        return None
    value = float(found[0].replace(",", ""))
    return value if math.isfinite(value) else None


GRADERS: dict[str, Grader] = {"exact_match": exact_match, "f1": f1, "numeric": numeric}


def grader(name: str) -> Grader:
    """The grader called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in GRADERS:
        raise ConfigError(f"reward.grader={name}: unknown; known: {', '.join(GRADERS)}")
    return GRADERS[name]
