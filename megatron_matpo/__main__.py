"""Command line of `matpo`; heavy imports come after parsing."""

from __future__ import annotations

import argparse
import os
import re
import sys

from megatron_matpo.command_line import parse
from megatron_matpo.errors import MatpoError
from megatron_matpo.prepare.arguments import run_data

_OVERRIDE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*=")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code (2: the configuration is wrong, 1: other errors)."""
    options = parse(arguments)
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
        case "doctor":
            return _doctor(options)
        case "simulate":
            print(_simulated(options), end="")
        case "data":
            return run_data(options)
        case "report":
            from megatron_matpo.launch.inspect import report

            print(report(options.run_dir))
        case "trace":
            from megatron_matpo.launch.inspect import trace

            print(f"{trace(options.run_dir, options.step)}  (open it at https://ui.perfetto.dev)")
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
            command=options.job_command or None,
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


def _doctor(options: argparse.Namespace) -> int:
    from megatron_matpo.doctor.command import Request, doctor

    recipe, overrides = options.recipe, list(options.overrides)
    if _OVERRIDE.match(recipe):  # `matpo doctor cluster.gpus_per_node=8`
        recipe, overrides = "", [recipe, *overrides]
    mode = "preflight" if options.preflight else "build" if options.build else "full"
    return doctor(Request(recipe, tuple(overrides), mode, options.json))


def _simulated(options: argparse.Namespace) -> str:
    from megatron_matpo.simulation.main import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
