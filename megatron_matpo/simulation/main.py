"""The command line's options to a simulation, and its output."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_matpo.errors import ConfigError
from megatron_matpo.simulation.command import Request, as_json, simulate
from megatron_matpo.simulation.rates import as_yaml
from megatron_matpo.simulation.text import as_text


def run(options: argparse.Namespace) -> str:
    """What `matpo simulate` prints.

    Raises:
        ConfigError: as `command.simulate`, or an option is wrong.
    """
    simulation = simulate(
        Request(
            recipe=options.recipe,
            overrides=options.overrides,
            rates=options.rates,
            lengths=options.lengths,
            from_run=tuple(options.from_run),
            fit_steps=_range(options.fit_steps),
            staleness=options.staleness,
            num_steps=options.steps,
        )
    )
    if options.save_rates:
        try:
            Path(options.save_rates).write_text(as_yaml(simulation.rates), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--save-rates={options.save_rates}: {error}") from error
    return as_json(simulation) + "\n" if options.json else as_text(simulation)


def _range(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if not match or int(match[1]) > int(match[2]):
        raise ConfigError(f"--fit-steps={text}: expected first and last step, as in 2-4")
    return int(match[1]), int(match[2])
