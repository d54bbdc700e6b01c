"""`matpo data check`: everything that is wrong with data sets, or a summary of them."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

from megatron_matpo.agents.prompt_check import ListedTool, listed_tools
from megatron_matpo.config.root import Config
from megatron_matpo.data.chat import Chat
from megatron_matpo.data.check import Findings, check_set
from megatron_matpo.data.dataset import Question
from megatron_matpo.data.tokenizer import Tokenizer
from megatron_matpo.prepare.recipe import load

_HEAD = ("data set", "rows", "questions", "copies", "data source", "levels", "types")
_MAX_VALUES = 6


def check_command(options: argparse.Namespace) -> int:
    """Check all data sets; 0 if none has a problem, else 2."""
    config = load(options.recipe, options.overrides) if options.recipe else None
    folder = options.folder or (config.data.folder if config is not None else "")
    results: list[Findings] = []
    for source in options.sources:
        with_recipe = RecipeCheck(config) if config is not None else None
        found = check_set(source, folder, more=with_recipe, max_shown=options.max_shown)
        results.append(found)
        print_findings(found, with_recipe)
    sound = [found for found in results if not found.num_problems]
    if sound:
        print(table([_HEAD, *(_cells(found) for found in sound)]))
    return 0 if len(sound) == len(results) else 2


class RecipeCheck:
    """Rows against a recipe: servers that prompts offer, and lengths of prompts in tokens.

    In a recipe that renders its prompts (`rollout.prompts: rendered`) the row's system message is
    not shown to the policy; its servers are only noted, and only the user message is measured.
    """

    def __init__(self, config: Config) -> None:
        """Load the recipe's tokenizer.

        Raises:
            ConfigError: `model.path` has no usable tokenizer.
        """
        planner = config.agents[config.rollout.planner]
        self.notes: Counter[str] = Counter()
        self.max_tokens = 0
        self.measured = "prompt" if config.rollout.prompts == "dataset" else "user message"
        self._chat = Chat(Tokenizer.load(config.model.path))
        self._allowed = set(planner.tools)
        context = planner.context_length or config.rollout.context_length
        # As the driver has it, which also keeps one token free for the engine.
        reserve = planner.summary_reserve_tokens if planner.final_summary != "never" else 0
        self._limit = max(0, context - reserve - 1)
        self._shows_row = config.rollout.prompts == "dataset"

    def __call__(self, question: Question) -> Iterator[tuple[str, str]]:
        """Problems of one row."""
        offered = {tool.server for tool in _listed(question.system)} - {""}
        foreign = sorted(offered - self._allowed)
        if foreign:
            allowed = ", ".join(sorted(self._allowed)) or "nothing"
            text = f"offers {', '.join(foreign)}, but the recipe's planner may call {allowed}"
            if self._shows_row:
                yield "prompt[0].content", text
            else:
                self.notes[f"prompt[0].content {text} (not shown: rollout.prompts=rendered)"] += 1
        system = question.system if self._shows_row else ""
        num_tokens = len(self._chat.initial_ids(system, question.user)[0])
        self.max_tokens = max(self.max_tokens, num_tokens)
        if num_tokens >= self._limit:
            text = f"expected fewer than the {self._limit} tokens that the planner's turns may fill"
            yield "prompt", f"{text}, got {num_tokens}"


@lru_cache(maxsize=8)
def _listed(prompt: str) -> list[ListedTool]:
    """Thousands of rows share a prompt."""
    return listed_tools(prompt)


def print_findings(found: Findings, with_recipe: RecipeCheck | None = None) -> None:
    """The first problems one by one, then all by kind, then what is unusual but allowed."""
    for problem in found.problems:
        print(problem)
    if found.num_problems > len(found.problems):
        print(f"... and {found.num_problems - len(found.problems)} more problems")
    if found.num_problems:
        print(f"{found.name}: {found.num_problems} problem(s), {found.num_rows} rows could be read")
        for kind, count in found.kinds.most_common():
            print(f"{count:8d}  {kind}")
    notes = found.notes + (with_recipe.notes if with_recipe is not None else Counter[str]())
    for note, count in notes.items():
        print(f"{found.name}: note: {count} {note}")
    if with_recipe is not None and with_recipe.max_tokens:
        print(
            f"{found.name}: the longest {with_recipe.measured} has {with_recipe.max_tokens} tokens"
        )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _cells(found: Findings) -> tuple[str, ...]:
    return (
        found.name,
        str(found.num_rows),
        str(found.num_questions),
        " and ".join(str(copies) for copies in sorted(found.copies)),
        *(_values(c) for c in (found.data_sources, found.levels, found.question_types)),
    )


def _values(counts: Counter[str]) -> str:
    """`1: 39, 2: 52`, the most frequent ones."""
    shown = counts.most_common(_MAX_VALUES)
    more = f", {len(counts) - len(shown)} more" if len(counts) > len(shown) else ""
    return ", ".join(f"{value}: {count}" for value, count in sorted(shown)) + more
