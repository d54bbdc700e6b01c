"""Everything that can be wrong before anything starts, found in about a second and told at once."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

from megatron_matpo.config.load import collect_recipe, format_problems
from megatron_matpo.config.precision import PRECISIONS, Platform, decide_precision
from megatron_matpo.config.root import Config
from megatron_matpo.config.validate import Command, collect_violations
from megatron_matpo.errors import ConfigError, DataError
from megatron_matpo.launch.driver import ask_driver
from megatron_matpo.launch.nodes import address_of
from megatron_matpo.wire import recording_path


def collect_problems(
    recipe: str, overrides: list[str], command: Command
) -> tuple[Config, list[str]]:
    """Load a recipe and check all that `command` needs on this machine.

    Returns:
        The configuration, and one line for every violation of any kind.

    Raises:
        ConfigError: a file of the recipe cannot be read at all.
    """
    config, problems = collect_recipe(recipe, overrides)
    problems += collect_violations(config, command=command)
    problems += machine_violations(config, command)
    return config, problems


def check_recipe(recipe: str, overrides: list[str], command: Command) -> Config:
    """As `collect_problems`.

    Raises:
        ConfigError: one line for every violation of any kind.
    """
    config, problems = collect_problems(recipe, overrides, command)
    if problems:
        raise ConfigError(format_problems(problems))
    return config


def machine_violations(config: Config, command: Command) -> list[str]:
    """Violations that only this machine can show: datasets, tokenizer, the address to bind to."""
    problems: list[str] = []
    if command == "train" and not config.rollout.replay:
        problems += _dataset_violations(config, "data.train", config.data.train)
        if config.eval.is_wanted:
            problems += _eval_set_violations(config)
    if command != "sft" and not config.rollout.replay:
        problems += _router_violations(config)
    if command == "eval":
        problems += _eval_set_violations(config)
    if command == "train" and config.rollout.replay:
        problems += _recording_violations(config)
    if command == "sft":
        problems += _conversation_violations(config)
        problems += _export_violations(config.sft.export)
    problems += _template_violations(config.model.path)
    problems += _host_violations(config)
    if command != "eval":
        problems += _precision_violations(config)
    return problems


def _dataset_violations(config: Config, key: str, value: str) -> list[str]:
    """Every row has the shape that a rollout needs, and offers only tools that the planner has."""
    if not value:
        return [f"{key}=: expected a parquet file, a folder of them, or a name in data.folder"]
    from megatron_matpo.data.dataset import check_servers, read_questions

    where = f"{key}={value}"
    try:
        questions = read_questions(value, config.data.folder)
    except DataError as error:
        return [f"{where}: {str(error).removeprefix(f'{value}: ')}"]
    planner = config.agents.get(config.rollout.planner)
    if planner is None or config.rollout.prompts != "dataset":
        return []  # rendered: the manager reports differences once it knows the tools
    try:
        check_servers(questions, planner.tools, where)
    except ConfigError as error:
        return [str(error)]
    return []


def _eval_set_violations(config: Config) -> list[str]:
    if not config.eval.sets:
        return ["eval.sets=[]: evaluation needs at least one parquet file, folder or config"]
    return [
        problem
        for entry in config.eval.sets
        for problem in _dataset_violations(config, "eval.sets", entry)
    ]


def _conversation_violations(config: Config) -> list[str]:
    value = config.sft.data
    if not value:
        return ["sft.data=: expected a JSONL file of conversations"]
    if not Path(value).is_file():
        return [f"sft.data={value}: no such file"]
    if not (Path(config.model.path) / "tokenizer.json").is_file():
        return []  # reported with the model's other missing files
    from megatron_matpo.data.conversations import check_conversations

    try:
        check_conversations(value)
    except DataError as error:
        return [str(error)]
    return []


def _export_violations(value: str) -> list[str]:
    """An export replaces its folder whole, so it must not be one that holds something else."""
    if not value:
        return []
    folder = Path(value).resolve()
    is_other = folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()
    if is_other or folder.is_file():
        return [f"sft.export={value}: exists and is not a model folder; name a new folder"]
    return []


def _recording_violations(config: Config) -> list[str]:
    """Every step of the run has its recording."""
    folder = Path(config.rollout.replay)
    for step in range(1, config.run.steps + 1):
        file = recording_path(folder, step)
        if not file.is_file():
            return [
                f"rollout.replay={folder}: has no {file.name}; a run of run.steps="
                f"{config.run.steps} needs one for every step (obs.record_rollouts writes them)"
            ]
    return []


def _template_violations(folder: str) -> list[str]:
    """The tokenizer loads, and its chat template can be appended to."""
    if not (Path(folder) / "tokenizer.json").is_file():
        return []  # reported with the model's other missing files
    from megatron_matpo.data.chat import Chat
    from megatron_matpo.data.tokenizer import Tokenizer

    try:
        Chat(Tokenizer.load(folder))
    except ConfigError as error:
        return [str(error)]
    return []


def _router_violations(config: Config) -> list[str]:
    """The rollout environment has SGLang's router, if that is asked for."""
    python = config.rollout.python
    if config.rollout.router != "sglang" or not Path(python).is_file():
        return []  # a missing program is reported with the others
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('sglang_router') is None)"
    try:
        is_missing = subprocess.run([python, "-c", code], timeout=60, check=False).returncode != 0
    except (OSError, subprocess.TimeoutExpired):
        is_missing = True
    if not is_missing:
        return []
    return [
        f"rollout.router=sglang: {python} has no package sglang_router; install the version in "
        "requirements/rollout-router.txt there, or take rollout.router=builtin"
    ]


def _precision_violations(config: Config) -> list[str]:
    """The driver's GPU can do what `precision` asks; one that the recipe names was checked."""
    if config.cluster.device == "cpu" or config.cluster.gpu or config.precision not in PRECISIONS:
        return []
    capability = ask_driver()
    try:
        decide_precision(config, Platform(capability))
    except ConfigError as error:
        return [str(error)]
    return []


def _host_violations(config: Config) -> list[str]:
    """The address must be one of this machine's own."""
    host = config.cluster.host
    try:
        if config.cluster.interface or config.cluster.num_nodes > 1:
            address_of(config.cluster)
            return []
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except ConfigError as error:
        return [str(error)]
    except OSError as error:
        return [f"cluster.host={host}: not an address of this machine ({error.strerror or error})"]
    return []
