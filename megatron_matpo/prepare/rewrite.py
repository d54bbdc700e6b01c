"""`matpo data prompts`: a copy of a data set with the recipe's own system prompt.

Source: MATPO original, `update_system_prompt.py`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_matpo.data.locate import find_files
from megatron_matpo.data.write import rewrite_prompts
from megatron_matpo.errors import ConfigError
from megatron_matpo.prepare.recipe import describe_tools, live_specs, load, planner_of

_MAX_PROMPTS = 3


def rewrite_command(options: argparse.Namespace) -> int:
    """Render the planner's prompt, write the copy, and say what changed."""
    config = load(options.recipe, options.overrides)
    sources = find_files(options.source, options.folder or config.data.folder)
    planner = planner_of(config, live_specs(config))
    if not planner.tools:
        raise ConfigError(f"agents.{planner.name}.tools=[]: a planner without tools needs no list")
    prompt = replace(planner, takes_prompt_of_row=False).system_prompt("")
    done = rewrite_prompts(sources, Path(options.target), prompt)
    for old, rows in done.old_prompts.most_common(_MAX_PROMPTS):
        print(f"before: {rows} rows: {describe_tools(old)}")
    if len(done.old_prompts) > _MAX_PROMPTS:
        print(f"before: {len(done.old_prompts) - _MAX_PROMPTS} further prompts")
    print(f"now:    {done.num_rows} rows: {describe_tools(prompt)}")
    print(f"{options.target}: {done.num_rows} rows, {done.num_changed} with another prompt")
    return 0
