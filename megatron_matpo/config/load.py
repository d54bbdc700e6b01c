"""Reads a recipe: YAML files joined by `base:`, then dotted overrides, into a frozen `Config`.

Rules:

* `base:` names another recipe, or a list of them, relative to the file that holds it; mappings
  merge key by key, lists and values replace what the base says; of a list, later bases win over
  earlier ones; a file that several bases share counts once, where it comes first; cycles are
  refused;
* overrides are `dotted.key=value` with YAML values (`agents.main.tools=[search,browser]`);
* `${other.key}` refers to another value; resolvers such as `${oc.env:NAME}` are refused, because
  the resolved configuration is written to disk and must never hold a secret;
* everything that is wrong is reported at once, one line each: path, value, what is allowed.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_matpo.config.root import Config
from megatron_matpo.config.schema import check_mapping, flatten
from megatron_matpo.config.validate import check_values
from megatron_matpo.errors import ConfigError

_BASE = "base"
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def load_recipe(path: str, overrides: list[str]) -> Config:
    """Read the recipe at `path` and apply `overrides` (`dotted.key=value`).

    Checks keys, types, allowed values and ranges; what needs the file system or depends on the
    command is checked by `config.validate.validate`.

    Raises:
        ConfigError: with one line for every violation.
    """
    config, problems = collect_recipe(path, overrides)
    problems += check_values(config)
    if problems:
        raise ConfigError(format_problems(problems))
    return config


def load_resolved(path: str) -> Config:
    """Read what `dump_config` wrote (`runs/NAME/config.yaml`).

    Raises:
        ConfigError: the file is missing or does not hold a valid configuration.
    """
    return load_recipe(path, [])


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_resolved` reads it back."""
    # OmegaConf's dumper quotes text that its loader would take for a number (`1e-5`).
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def format_problems(problems: list[str]) -> str:
    """One message for all `problems`: a line each, without repetitions."""
    return "\n".join(dict.fromkeys(problems))


def collect_recipe(path: str, overrides: list[str]) -> tuple[Config, list[str]]:
    """Like `load_recipe`, but returns keys' and types' violations instead of raising them.

    Values with a violation are left at their defaults, so that later checks can go on and the user
    sees all of their mistakes at once.

    Raises:
        ConfigError: a file cannot be read at all, or the `base:` chain has a cycle.
    """
    problems: list[str] = []
    layers: list[dict[str, Any]] = []
    for name, raw in [*_read_chain(Path(path)), *_read_overrides(overrides, problems)]:
        clean, wrong = check_mapping(Config, raw, "")
        suffix = f" (in {name})" if name else ""
        problems += [problem + suffix for problem in wrong]
        layers.append(clean)
    return _merge(layers, problems), problems


def _merge(layers: list[dict[str, Any]], problems: list[str]) -> Config:
    """Merge checked layers onto the schema; interpolations are resolved here."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), *layers)
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        problems.append(_first_line(error))
        raise ConfigError(format_problems(problems)) from error
    assert isinstance(config, Config), "the schema is a Config"
    return config


def _read_chain(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file, content) of the recipe and all its bases, each once, before what builds on it."""
    chain: dict[Path, tuple[str, dict[str, Any]]] = {}
    _read_with_bases(path, (), chain)
    return list(chain.values())


def _read_with_bases(
    path: Path, wanted_by: tuple[Path, ...], chain: dict[Path, tuple[str, dict[str, Any]]]
) -> None:
    """Add the bases of `path`, then `path`, to `chain`; `wanted_by` leads from the recipe to it."""
    if path.resolve() in [item.resolve() for item in wanted_by]:
        names = " -> ".join(str(item.resolve()) for item in (*wanted_by, path))
        raise ConfigError(f"base: the recipes refer to each other in a circle: {names}")
    if path.resolve() in chain:
        return
    raw = _read_yaml(path, wanted_by=str(wanted_by[-1]) if wanted_by else "")
    for base in _bases(raw.pop(_BASE, None), path):
        _read_with_bases(path.parent / base, (*wanted_by, path), chain)
    chain[path.resolve()] = (str(path), raw)


def _bases(value: object, path: Path) -> list[str]:
    """What `base:` names."""
    if value is None:
        return []
    items = cast(list[object], value) if isinstance(value, list) else [value]
    bases = [item for item in items if isinstance(item, str) and item]
    if not bases or len(bases) < len(items):
        raise ConfigError(
            f"base={value!r}: expected the path of a recipe, or a list of them (in {path})"
        )
    return bases


def _read_yaml(path: Path, wanted_by: str) -> dict[str, Any]:
    """Content of one YAML file as plain containers, interpolations untouched."""
    reference = f" (base of {wanted_by})" if wanted_by else ""
    if not path.is_file():
        raise ConfigError(f"{path}: no such recipe file{reference}")
    try:
        loaded = OmegaConf.load(path)
        raw = OmegaConf.to_container(loaded, resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(raw).__name__}")
    return _by_text(raw)


def _read_overrides(overrides: list[str], problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """One layer per override, in order, so that a later one wins."""
    layers: list[tuple[str, dict[str, Any]]] = []
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not _KEY.fullmatch(key.strip()):
            problems.append(f"{text}: not an override; expected dotted.key=value")
            continue
        try:
            raw = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            problems.append(f"{text}: the value is not valid YAML: {' '.join(str(error).split())}")
            continue
        assert isinstance(raw, dict), "a dotlist is a mapping"
        layers.append(("", _by_text(raw)))
    return layers


def _by_text(raw: Any) -> dict[str, Any]:
    """`raw` with keys as text (YAML also has numbers and dates)."""
    return {str(key): value for key, value in raw.items()}


def _first_line(error: Exception) -> str:
    """OmegaConf's message without its lines about node types, led by the key."""
    key = getattr(error, "full_key", None)
    text = str(error).splitlines()[0]
    return f"{key}: {text}" if key else text


def diff_configs(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (old value, new value) of every value that differs; lists compare whole."""
    left = dict(flatten(dataclasses.asdict(old), ""))
    right = dict(flatten(dataclasses.asdict(new), ""))
    paths = sorted(left.keys() | right.keys())
    return {
        path: (left.get(path), right.get(path))
        for path in paths
        if left.get(path) != right.get(path)
    }
