"""Command line of `matpo`; heavy imports come after parsing."""

from __future__ import annotations

import argparse
import os
import re
import sys

from megatron_matpo import __version__
from megatron_matpo.errors import MatpoError
from megatron_matpo.prepare.arguments import add_data_command, run_data

_OVERRIDE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*=")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code (2: the configuration is wrong, 1: other errors)."""
    options = _parse(arguments)
    try:
        return _dispatch(options)
    except MatpoError as error:
        if os.environ.get("MATPO_DEBUG") == "1":
            raise
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; without this, Python complains while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Like `parse_args`, but overrides may also follow an option."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [item for item in rest if item.startswith("-") or "overrides" not in options]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
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
    for name, text in (
        ("report", "write report.html of a run and print its path"),
        ("status", "say what the processes of a run are doing"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("run_dir", help="folder of the run, as in runs/default")
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
        default="train",
        choices=("train", "sft", "eval"),
        help="what to run there (default: train)",
    )
    command.add_argument(
        "--model", default="", metavar="FOLDER", help="with --command eval: what to evaluate"
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


def _dispatch(options: argparse.Namespace) -> int:
    match options.command:
        case "train" | "sft":
            from megatron_matpo.launch.run import run

            return run(
                options.command,
                options.recipe,
                options.overrides,
                accept_changes=options.accept_changes,
            )
        case "eval":
            from megatron_matpo.launch.eval import EvalRequest, evaluate

            # `--data A B run.name=x`: what looks like an override is one.
            taken = [item for item in options.data if _OVERRIDE.match(item)]
            return evaluate(
                EvalRequest(
                    recipe=options.recipe,
                    model=options.model,
                    data=[item for item in options.data if item not in taken],
                    samples=options.samples,
                    max_rows=options.max_rows,
                    overrides=[*taken, *options.overrides],
                    accept_changes=options.accept_changes,
                )
            )
        case "export":
            return _exported(options)
        case "config":
            from megatron_matpo.config import dump_config, load_recipe

            print(dump_config(load_recipe(options.recipe, options.overrides)), end="")
        case "plan":
            print(_planned(options), end="")
        case "launch":
            return _launched(options)
        case "logs":
            return _followed(options)
        case "data":
            return run_data(options)
        case "report":
            from megatron_matpo.launch.inspect import report

            print(report(options.run_dir))
        case _:
            from megatron_matpo.launch.inspect import status_text

            print(status_text(options.run_dir))
    return 0


def _exported(options: argparse.Namespace) -> int:
    from megatron_matpo.launch.export import ExportRequest, export

    return export(
        ExportRequest(
            source=options.source,
            step=options.step,
            out=options.out,
            dtype=options.dtype,
            model=options.model,
            force=options.force,
        )
    )


def _planned(options: argparse.Namespace) -> str:
    from megatron_matpo.planning.command import Expectation, as_json, make_run_plan
    from megatron_matpo.planning.text import as_text

    known = Expectation(options.lengths, options.mean_tokens, options.workers)
    plan = make_run_plan(options.recipe, options.overrides, known)
    return as_json(plan) if options.json else as_text(plan)


def _launched(options: argparse.Namespace) -> int:
    from megatron_matpo.launch.launch import LaunchRequest, launch

    return launch(
        LaunchRequest(
            recipe=options.recipe,
            cluster=options.cluster,
            command=options.job_command,
            model=options.model,
            dry_run=options.dry_run,
            write=options.write,
            overrides=options.overrides,
        )
    )


def _followed(options: argparse.Namespace) -> int:
    from megatron_matpo.launch.logs import LogsRequest, show_logs

    return show_logs(
        LogsRequest(
            run_dir=options.run_dir,
            follow=options.follow,
            role=options.role,
            node=options.node,
            since=options.since,
            lines=options.lines,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
