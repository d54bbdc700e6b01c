"""Command line of `matpo data check|build|prompts`. Heavy imports come after parsing."""

from __future__ import annotations

import argparse

from megatron_matpo.errors import ConfigError

_NAMES = (
    "a config of MATPO-data, as in matpo_val_gaia_repeat_8, or its source: musique, gaia, frames, "
    "webwalkerqa"
)


def add_data_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `data` with its three verbs."""
    text = "check, build or rewrite data sets"
    verbs = commands.add_parser("data", help=text).add_subparsers(dest="verb", required=True)
    check = verbs.add_parser("check", help="check every row, and summarise")
    check.add_argument("sources", nargs="+", metavar="PATH_OR_NAME")
    check.add_argument("--max-shown", type=_count, default=20, help="problems shown per data set")
    _add_common(check, "also check against this recipe's planner, tokenizer and context length")
    build = verbs.add_parser("build", help="build a config of MATPO-data from public raw files")
    build.add_argument("name", help=_NAMES)
    build.add_argument("--raw", required=True, help="raw file, or the folder that it lies in")
    build.add_argument("--out", required=True, help="folder for NAME/train-*.parquet")
    build.add_argument("--repeat", type=_positive, help="copies of each question")
    build.add_argument("--mode", choices=("matpo", "single_agent"), help="if NAME is a source")
    build.add_argument("--replace", action="store_true", help="overwrite an earlier result")
    build.add_argument("--seed", type=_count, default=0, help="of the order (0)")
    build.add_argument("--limit", type=_count, default=0, help="keep so many questions (0: all)")
    build.add_argument(
        "--hops", type=_positive, nargs="+", default=[2, 3, 4], help="MuSiQue: hops (2 3 4)"
    )
    build.add_argument(
        "--max-answer-words", type=_positive, default=10, help="MuSiQue: longest answer (10)"
    )
    build.add_argument("--ids", help="GAIA: file with the task ids to take")
    build.add_argument(
        "--exclude", nargs="+", default=[], help="data sets whose questions are left out"
    )
    _add_common(build, "render the prompts from this recipe's agents and live tool schemas")
    prompts = verbs.add_parser("prompts", help="copy a data set with a recipe's system prompt")
    prompts.add_argument("source", metavar="SRC", help="data set: name, file or folder")
    prompts.add_argument("target", metavar="DST", help="new .parquet file, or new folder")
    _add_common(prompts, "whose planner and live tool schemas make the prompt", required=True)


def run_data(options: argparse.Namespace) -> int:
    """Run the chosen verb; the exit code (2: a checked data set has problems).

    Raises:
        ConfigError: the command line, the recipe or a data set is wrong.
    """
    if options.overrides and not options.recipe:
        raise ConfigError(f"{options.overrides[0]}: overrides a recipe, but there is no --recipe")
    match options.verb:
        case "check":
            from megatron_matpo.prepare.check import check_command

            return check_command(options)
        case "build":
            from megatron_matpo.prepare.build import build_command

            return build_command(options)
        case _:
            from megatron_matpo.prepare.rewrite import rewrite_command

            return rewrite_command(options)


def _add_common(parser: argparse.ArgumentParser, recipe: str, required: bool = False) -> None:
    parser.add_argument("--folder", help="where names are looked up (the recipe's data.folder)")
    parser.add_argument("--recipe", required=required, help=recipe)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="key=value",
        help="override a setting of the recipe",
    )


def _count(text: str) -> int:
    """An integer from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer from 0 on, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 on, got {text!r}")
    return int(text)
