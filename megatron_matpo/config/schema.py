"""Checks raw YAML against the dataclass schema, key by key, and collects what is wrong.

OmegaConf stops at the first violation and names Python types; a user wants all of them at once and
the name that was probably meant. Conversions (the text `3` for an int) stay OmegaConf's.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterator
from typing import Any, cast, get_args, get_origin, get_type_hints

from megatron_matpo.config.root import Config

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_RESOLVER = re.compile(r"\$\{[^}]*:")
_ANY_NAME = "<name>"


def check_mapping(
    cls: type, raw: dict[Any, Any], path: str, root: type = Config
) -> tuple[dict[str, Any], list[str]]:
    """Compare `raw` with the dataclass `cls` whose dotted path is `path`.

    `root` is the whole schema, where names are looked for that may have been meant.

    Returns:
        The part of `raw` that fits, and one line per violation.
    """
    hints = _hints(cls)
    clean: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in raw.items():
        where = _join(path, key)
        if key not in hints:
            for leaf, leaf_value in flatten(value, where):
                problems.append(_unknown(leaf, leaf_value, where, path, list(hints), root))
            continue
        kept, wrong = _check(hints[key], value, where, root)
        problems += wrong
        if not wrong or kept is not None:
            clean[key] = kept
    return clean, problems


def flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every leaf; lists and empty mappings are leaves."""
    items = _mapping(value)
    if items:
        for key, item in items.items():
            yield from flatten(item, _join(path, key))
    else:
        yield path, value


def known_paths(cls: type = Config, path: str = "") -> list[str]:
    """Dotted paths of all settings; a name that the user chooses is `<name>`."""
    paths: list[str] = []
    for key, hint in _hints(cls).items():
        where = _join(path, key)
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            paths += known_paths(hint, where)
        elif get_origin(hint) is dict and dataclasses.is_dataclass(get_args(hint)[1]):
            paths += known_paths(get_args(hint)[1], f"{where}.{_ANY_NAME}")
        else:
            paths.append(where)
    return paths


def _check(hint: Any, value: Any, path: str, root: type) -> tuple[Any, list[str]]:
    """Check one value; returns (what to keep or None, violations)."""
    if isinstance(value, str) and _RESOLVER.search(value):
        text = "resolvers such as ${oc.env:...} are not allowed; only ${section.key} is"
        return None, [f"{path}={value}: {text}"]
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _check_section(hint, value, path, root)
    origin = get_origin(hint)
    if origin is dict:
        return _check_dict(get_args(hint)[1], value, path, root)
    if isinstance(value, str) and "${" in value:
        return value, []
    if origin is list:
        return _check_list(get_args(hint)[0], value, path)
    return _check_scalar(hint, value, path)


def _check_section(cls: type, value: Any, path: str, root: type) -> tuple[Any, list[str]]:
    if value is None:
        return {}, []
    raw = _mapping(value)
    if raw is None:
        keys = ", ".join(list(_hints(cls))[:4])
        return None, [f"{path}={value}: expected a mapping with keys such as {keys}"]
    return check_mapping(cls, raw, path, root)


def _check_dict(item_hint: Any, value: Any, path: str, root: type) -> tuple[Any, list[str]]:
    if value is None:
        return {}, []
    raw = _mapping(value)
    if raw is None:
        return None, [f"{path}={value}: expected a mapping of names"]
    clean: dict[str, Any] = {}
    problems: list[str] = []
    for name, item in raw.items():
        where = _join(path, name)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.append(f"{where}: a name consists of letters, digits, '_' and '-'")
            continue
        kept, wrong = _check(item_hint, item, where, root)
        problems += wrong
        if kept is not None:
            clean[name] = kept
    return clean, problems


def _check_list(item_hint: Any, value: Any, path: str) -> tuple[Any, list[str]]:
    if value is None:
        return [], []
    if not isinstance(value, list):
        name = item_hint.__name__
        return None, [f"{path}={value}: expected a list of {name}, as in [a, b]"]
    problems: list[str] = []
    for index, item in enumerate(cast("list[Any]", value)):
        _, wrong = _check_scalar(item_hint, item, f"{path}[{index}]")
        problems += wrong
    return (None if problems else cast("list[Any]", value)), problems


def _check_scalar(hint: type, value: Any, path: str) -> tuple[Any, list[str]]:
    """A str, int, float or bool; text that reads as a number is taken, as OmegaConf does."""
    if hint is str and value is None:
        return "", []
    if hint is str and isinstance(value, str | int | float):
        return value, []
    if hint is bool and (isinstance(value, bool) or str(value).lower() in _BOOL_WORDS):
        return value, []
    if hint is int and not isinstance(value, bool) and re.fullmatch(r"[-+]?\d+", str(value)):
        return int(value), []
    if hint is float and not isinstance(value, bool) and _is_finite(value):
        return float(value), []
    expected: dict[type, str] = {
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
    }
    return None, [f"{path}={_show(value)}: expected {expected.get(hint, 'text')}"]


_BOOL_WORDS = frozenset({"true", "false", "yes", "no", "on", "off"})


def _mapping(value: Any) -> dict[Any, Any] | None:
    return cast("dict[Any, Any]", value) if isinstance(value, dict) else None


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _unknown(
    path: str, value: Any, where: str, parent: str, siblings: list[str], root: type
) -> str:
    """Text for an unknown key: the nearest sibling, else the nearest setting anywhere."""
    rest = path[len(where) :]
    key = where[len(parent) + 1 :] if parent else where
    close = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if close:
        meant = _join(parent, close[0]) + rest
        if rest:
            meant = (difflib.get_close_matches(meant, known_paths(root), n=1) or [meant])[0]
        return f"{path}={_show(value)}: no such key; did you mean {meant}?"
    leaf = path.rsplit(".", 1)[-1]
    named = [known for known in known_paths(root) if known.rsplit(".", 1)[-1] == leaf]
    near = named or difflib.get_close_matches(path, known_paths(root), n=1, cutoff=0.6)
    if near:
        return f"{path}={_show(value)}: no such key; did you mean {near[0]}?"
    allowed = ", ".join(sorted(siblings))
    section = f"{parent} has" if parent else "the sections are"
    return f"{path}={_show(value)}: no such key; {section} {allowed}"


def _show(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Field name -> resolved type."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
