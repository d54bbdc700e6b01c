"""The published figures of MATPO, to print beside ours. Theirs: nothing here was measured by us.

Source: MATPO (arXiv:2510.04678), the results of its README for 14B models after 180 steps, in
percent. They are means over all rows of the sets of MATPO-data, whose questions come 8 times
(GAIA-text) and twice (WebWalkerQA, FRAMES). Only the mean can be compared; best@k and majority@k
are not published.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from megatron_matpo.data.schema import parse_name

SOURCE = "arXiv:2510.04678"


@dataclass(frozen=True, slots=True)
class PaperScore:
    """What the paper reports for one benchmark, in percent."""

    benchmark: str
    num_samples: int
    """k of its mean@k."""
    num_questions: int
    """Of the benchmark's set in MATPO-data; fewer of ours are not the same measurement."""
    single_agent: float
    """GRPO with one agent that has the search tools itself."""
    matpo: float


_SCORES = {
    "gaia": PaperScore("GAIA-text", 8, 103, 32.16, 42.60),
    "webwalkerqa": PaperScore("WebWalkerQA", 2, 680, 30.14, 33.00),
    "frames": PaperScore("FRAMES", 2, 824, 56.22, 63.64),
}
# Names of `data_source`. That of GAIA-text is known from the original code; the others are what
# sets of these names would be called.
_DATA_SOURCES = {
    "gaia": re.compile(r"gaia_text_103.*", re.IGNORECASE),
    "webwalkerqa": re.compile(r"webwalkerqa.*", re.IGNORECASE),
    "frames": re.compile(r"frames(_.*)?", re.IGNORECASE),
}


def paper_score(name: str, data_sources: Collection[str]) -> PaperScore | None:
    """The paper's figures for a set, by its name as in MATPO-data or else by its `data_source`.

    None if the paper has none: then nothing must be printed beside ours.
    """
    config = parse_name(name)
    if config is not None:
        return _SCORES.get(config.family)
    for family, pattern in _DATA_SOURCES.items():
        if data_sources and all(pattern.fullmatch(source) for source in data_sources):
            return _SCORES[family]
    return None
