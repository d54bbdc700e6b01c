r"""The final answer: the last `\boxed{...}` of what the planner itself said last.

Source: MATPO original, `verl/utils/reward_score/llm_judge.py`. Differs: only the planner's own last
turn is searched (there: the whole decoded response, tool replies and workers' reports included);
braces nest to any depth; an unfinished box is no answer.
"""

from __future__ import annotations

import re

# After any number of backslashes: a model that also writes JSON doubles them.
_TOKENS = re.compile(r"\\boxed\{|\\(?!\\boxed\{).|[{}]", re.DOTALL)


def extract_answer(said: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` in `said`; None if there is none.

    Braces must balance; `\{` and `\}` do not count, as in LaTeX. Of nested boxes the inner one is
    taken. Takes linear time.
    """
    best: tuple[int, int] | None = None
    opened: list[int | None] = []  # start of a box's content, or None for a plain brace
    for token in _TOKENS.finditer(said):
        if token[0] == "{":
            opened.append(None)
        elif token[0] == "}":
            start = opened.pop() if opened else None
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
        elif len(token[0]) > 2:
            opened.append(token.end())
    return None if best is None else said[best[0] : best[1]].strip()
