"""The command line of `matpo`: its commands and their options."""

from __future__ import annotations

import argparse

from megatron_matpo import __version__
from megatron_matpo.prepare.arguments import add_data_command


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Like `parse_args`, but overrides may also follow an option."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [item for item in rest if item.startswith("-") or "overrides" not in options]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options


def make_parser() -> argparse.ArgumentParser:
    """All commands."""
    parser = argparse.ArgumentParser(
        prog="matpo", description="Reinforcement learning of planner/worker agents."
    )
    parser.add_argument("--version", action="version", version=f"matpo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("train", "train a recipe with reinforcement learning"),
        ("sft", "supervised training with the same trainer"),
        ("config", "print the resolved configuration of a recipe"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("recipe", help="YAML file")
        command.add_argument("overrides", nargs="*", help="dotted.key=value", metavar="key=value")
        if name != "config":
            command.add_argument(
                "--accept-changes",
                action="store_true",
                help="resume although settings differ from those of the earlier attempt",
            )
    _add_eval(commands)
    _add_export(commands)
    _add_plan(commands)
    _add_launch(commands)
    _add_logs(commands)
    _add_doctor(commands)
    _add_simulate(commands)
    for name, text in (
        ("report", "write report.html of a run and print its path"),
        ("status", "say what the processes of a run are doing"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("run_dir", help="folder of the run, as in runs/default")
    command = commands.add_parser("trace", help="write a step's timeline for ui.perfetto.dev")
    command.add_argument("run_dir", help="folder of the run, as in runs/default")
    command.add_argument(
        "--step", type=int, metavar="N", help="default: the newest that was recorded"
    )
    add_data_command(commands)
    return parser


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("eval", help="evaluate a model with a recipe's agents and tools")
    command.add_argument("recipe", help="YAML file")
    command.add_argument(
        "--model", required=True, metavar="FOLDER", help="Hugging Face folder, as checkpoints/hf"
    )
    command.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME_OR_PATH",
        help="evaluation sets: names in data.folder, parquet files or folders (default: eval.sets)",
    )
    command.add_argument("--samples", type=int, metavar="K", help="episodes per row")
    command.add_argument("--max-rows", type=int, metavar="N", help="rows of each set; 0: all")
    command.add_argument("overrides", nargs="*", help="dotted.key=value", metavar="key=value")
    command.add_argument(
        "--accept-changes",
        action="store_true",
        help="continue although settings, model or rows differ from those of the earlier results",
    )


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder")
    command.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="as in runs/default")
    command.add_argument("--step", type=int, metavar="N", help="of a run; default: the latest")
    command.add_argument("--out", default="", metavar="FOLDER", help="default: .../hf_step_N")
    command.add_argument(
        "--dtype", default="", choices=("bf16", "fp32"), help="default: as trained"
    )
    command.add_argument(
        "--model", default="", metavar="FOLDER", help="config and tokenizer (default: model.path)"
    )
    command.add_argument("--force", action="store_true", help="replace an existing folder")


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "plan", help="reckon memory, micro-batches and layouts of a recipe, starting nothing"
    )
    command.add_argument("recipe", help="YAML file; model.path needs no more than a config.json")
    command.add_argument("overrides", nargs="*", help="dotted.key=value", metavar="key=value")
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.add_argument(
        "--lengths", default="", metavar="FILE", help="trajectory lengths, one number per line"
    )
    command.add_argument(
        "--mean-tokens", type=int, default=0, metavar="N", help="mean length of a trajectory"
    )
    command.add_argument(
        "--workers", type=float, default=-1.0, metavar="W", help="worker trajectories per planner"
    )


def _add_launch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("launch", help="submit a recipe to a cluster (docs/cluster.md)")
    command.add_argument("recipe", help="YAML file")
    command.add_argument(
        "--cluster", required=True, metavar="FILE", help="as slurm/cluster.example.yaml"
    )
    command.add_argument(
        "--command",
        dest="job_command",
        default="",
        choices=("train", "sft", "eval"),
        help="what to run there (default: what the recipe has data for)",
    )
    command.add_argument(
        "--model", default="", metavar="FOLDER", help="of an evaluation: what to evaluate"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="print all that would be submitted, start nothing"
    )
    command.add_argument(
        "--write", default="", metavar="FILE", help="write a script for sbatch, start nothing"
    )
    command.add_argument("overrides", nargs="*", help="dotted.key=value", metavar="key=value")


def _add_logs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("logs", help="all logs of a run as one, in order of time")
    command.add_argument("run_dir", help="folder of the run, as in runs/default")
    command.add_argument("-f", "--follow", action="store_true", help="wait for more, until Ctrl-C")
    command.add_argument("--role", default="", help="as trainer, engine-1, slurm")
    command.add_argument("--node", type=int, default=-1, metavar="N", help="roles of this node")
    command.add_argument(
        "--since", default="", metavar="TIME", help="30s, 10m, 2h, 1d ago, or 2026-01-31T12:00"
    )
    command.add_argument("-n", "--lines", type=int, default=-1, metavar="N", help="the last N only")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("doctor", help="check what a run needs of the machines")
    command.add_argument("recipe", nargs="?", default="", help="YAML file; without: the machine")
    command.add_argument("overrides", nargs="*", help="dotted.key=value", metavar="key=value")
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    mode = command.add_mutually_exclusive_group()
    mode.add_argument(
        "--preflight",
        action="store_true",
        help="before a job: quick checks, one line if all is well",
    )
    mode.add_argument(
        "--build", action="store_true", help="of an image, where no GPU is: software only"
    )


def _add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "simulate", help="a training step in time, and in other placements, starting nothing"
    )
    command.add_argument("recipe", help="YAML file; model.path needs no more than a config.json")
    command.add_argument("overrides", nargs="*", help="dotted.key=value", metavar="key=value")
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.add_argument(
        "--rates", default="", metavar="FILE", help="what the machines do (default: by cluster.gpu)"
    )
    command.add_argument(
        "--lengths",
        default="",
        metavar="FILE",
        help="rollouts/step_N.jsonl, a run's folder, or distributions as YAML (default: assumed)",
    )
    command.add_argument(
        "--from-run",
        action="append",
        default=[],
        metavar="RUN_DIR",
        help="rates and lengths of a run that was made; may be repeated",
    )
    command.add_argument(
        "--fit-steps", default="", metavar="A-B", help="of those runs, use only these steps"
    )
    command.add_argument(
        "--save-rates", default="", metavar="FILE", help="write the rates that were used"
    )
    command.add_argument(
        "--staleness",
        type=int,
        default=0,
        metavar="S",
        help="of the asynchronous placement (default: the recipe's, at least 1)",
    )
    command.add_argument(
        "--steps", type=int, default=2, metavar="N", help="steps to average over (default: 2)"
    )
