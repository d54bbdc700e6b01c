"""Graders: is this answer the ground truth? Pure functions of two texts, by name.

Source: `exact_match` and `f1` normalise as SQuAD's evaluation does (Rajpurkar et al. 2016: lower
case, no punctuation, no articles, single spaces). Differs: Unicode is folded first (NFKC), LaTeX
text commands are unwrapped, punctuation is whatever Unicode says it is, and it separates words
instead of vanishing ("1990-1995" is "1990 1995"; "1,000" is not "1000", nor "U.S." "US"). MATPO
asks an LLM judge instead (`rewards.judge`); these need no service.
"""

from __future__ import annotations

import math
import re
import string
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


def gaia(answer: str, truth: str) -> float:
    """1 if GAIA's own rule calls the answer right, else 0; the truth says which rule it is.

    A number: equal as numbers, without `$`, `%` and thousands separators. A list, separated by
    commas or semicolons: as many elements, each equal, as a number or without spaces and letter
    case. Anything else: equal without spaces, letter case and ASCII punctuation.

    Source: arXiv:2311.12983, quasi exact match. Differs: `nan` and `inf` are words, not numbers.
    """
    if _finite(truth) is not None:
        return float(_finite(_NO_UNIT.sub("", answer)) == _finite(truth))
    if "," not in truth and ";" not in truth:
        return float(_letters(answer) == _letters(truth))
    got, expected = _SEPARATOR.split(answer), _SEPARATOR.split(truth)
    if len(got) != len(expected):
        return 0.0
    return float(all(map(_same_element, got, expected)))


_NO_UNIT = re.compile(r"[$%,]")
_SEPARATOR = re.compile(r"[,;]")
_NOT_LETTERS = str.maketrans("", "", string.punctuation)


def _same_element(got: str, expected: str) -> bool:
    if _finite(expected) is not None:
        return _finite(_NO_UNIT.sub("", got)) == _finite(expected)
    return _squeezed(got) == _squeezed(expected)


def _letters(text: str) -> str:
    return _squeezed(text).translate(_NOT_LETTERS)


def _squeezed(text: str) -> str:
    return "".join(text.split()).lower()


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


GRADERS: dict[str, Grader] = {
    "exact_match": exact_match,
    "f1": f1,
    "numeric": numeric,
    "gaia": gaia,
}


def grader(name: str) -> Grader:
    """The grader called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in GRADERS:
        raise ConfigError(f"reward.grader={name}: unknown; known: {', '.join(GRADERS)}")
    return GRADERS[name]
