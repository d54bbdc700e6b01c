"""`matpo data build`: a config of MATPO-data from the raw files of its source."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from megatron_matpo.config.root import Config
from megatron_matpo.data.check import check_set
from megatron_matpo.data.dataset import read_questions
from megatron_matpo.data.raw.questions import BuildOptions, Selection, normalized, rows_of
from megatron_matpo.data.raw.sources import data_source, select
from megatron_matpo.data.schema import CONFIGS, REPEATS, DataSet, parse_name
from megatron_matpo.data.write import write_set
from megatron_matpo.errors import ConfigError, DataError
from megatron_matpo.prepare.check import print_findings
from megatron_matpo.prepare.recipe import (
    default_config,
    describe_tools,
    live_specs,
    load,
    planner_of,
    serper_specs,
)


def build_command(options: argparse.Namespace) -> int:
    """Select, render, write, and check what was written."""
    target = target_of(options.name, options.mode, options.repeat)
    recipe = load(options.recipe, options.overrides) if options.recipe else None
    if recipe is not None:
        _check_mode(recipe, target)
    folder = options.folder or (recipe.data.folder if recipe is not None else "")
    chosen = select(
        target.family,
        options.raw,
        BuildOptions(
            seed=options.seed,
            limit=options.limit,
            hops=tuple(options.hops),
            max_answer_words=options.max_answer_words,
            ids=read_ids(options.ids) if options.ids else None,
            exclude=_questions_of(options.exclude, folder),
        ),
    )
    config = recipe if recipe is not None else default_config(target.mode)
    has_servers = recipe is not None and bool(recipe.tools.servers)
    planner = planner_of(config, live_specs(config) if has_servers else serper_specs())
    system = replace(planner, takes_prompt_of_row=False).system_prompt("")
    source = data_source(target.family, len(chosen.questions), target.repeat)
    rows = rows_of(chosen.questions, target, system, source)
    file = write_set(Path(options.out), target, rows, options.replace)
    _print_selection(chosen, target)
    print(f"tools in the prompt: {describe_tools(system)}")
    found = check_set(target.name, options.out)
    print_findings(found)
    print(f"{file}: {found.num_rows} rows, {found.num_questions} questions")
    return 2 if found.num_problems else 0


def target_of(name: str, mode: str | None, repeat: int | None) -> DataSet:
    """The data set that a command line names, in full or by source, mode and copies.

    Raises:
        ConfigError: no such source, or name and options contradict each other.
    """
    named = parse_name(name)
    if named is None:
        if name not in REPEATS:
            raise ConfigError(
                f"{name}: no such data set; configs: {', '.join(CONFIGS)}; sources (with --mode): "
                f"{', '.join(REPEATS)}"
            )
        if mode is None:
            raise ConfigError(f"{name}: add --mode matpo or --mode single_agent")
        return DataSet(name, mode, repeat or REPEATS[name])
    if mode not in (None, named.mode):
        raise ConfigError(f"--mode {mode}: {name} is for {named.mode}")
    if repeat not in (None, named.repeat):
        raise ConfigError(
            f"--repeat {repeat}: {name} has {named.repeat} of each question; say "
            f"{named.family} --mode {named.mode} --repeat {repeat}"
        )
    return named


def read_ids(path: str) -> frozenset[str]:
    """Task ids: one per line, or a JSON list of them or of objects with a `task_id`.

    Raises:
        DataError: the file cannot be read, or holds no id.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--ids {path}: cannot be read ({error})") from error
    if not text.lstrip().startswith("["):
        ids = [line.strip() for line in text.splitlines()]
    else:
        try:
            items = cast("list[Any]", json.loads(text))
        except ValueError as error:
            raise DataError(f"--ids {path}: not valid JSON ({error})") from error
        ids = [str(item.get("task_id", "") if isinstance(item, dict) else item) for item in items]
    found = frozenset(filter(None, ids))
    if not found:
        raise DataError(f"--ids {path}: holds no task id")
    return found


def _questions_of(sources: list[str], folder: str) -> frozenset[str]:
    """Normalised questions of data sets."""
    return frozenset(
        normalized(question.question)
        for source in sources
        for question in read_questions(source, folder)
    )


def _check_mode(config: Config, target: DataSet) -> None:
    """The recipe's planner delegates if, and only if, the data set is for MATPO."""
    name = config.rollout.planner
    workers = [tool for tool in config.agents[name].tools if tool in config.agents]
    if bool(workers) != (target.mode == "matpo"):
        what = f"delegates to {', '.join(workers)}" if workers else "delegates to no worker"
        raise ConfigError(
            f"rollout.planner={name}: {what}, which does not fit {target.name}; name another "
            "planner (--set rollout.planner=...) or build the variant for the other mode"
        )


def _print_selection(chosen: Selection, target: DataSet) -> None:
    print(f"{target.name}: {chosen.num_read} records read, {len(chosen.questions)} questions kept")
    for reason, count in chosen.dropped.most_common():
        print(f"{count:8d}  left out: {reason}")
    for note, count in chosen.notes.items():
        print(f"{target.name}: note: {count} {note}")
