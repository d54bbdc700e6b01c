"""JSON that a model wrote: read strictly, and checked against a tool's schema.

Invariants:

* what passes can be sent to a tool server as it is (UTF-8, finite numbers, bounded depth), so that
  a model's mistake never looks like the server's;
* nothing here raises for any text or schema except the `ValueError` and `RecursionError` that
  `decode_json` announces.

Source: the JSON Schema keywords type, anyOf, oneOf, enum, const, items, properties, required and
additionalProperties. Differs: arguments that the schema does not name are refused unless it allows
them in so many words, because servers ignore or refuse them; other keywords are left to the server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from megatron_matpo.agents.grammar import CallOutcome

_BRACKETS = re.compile(r"[\[\]{}]")
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"')
# The MCP SDK refuses to serialise a little more than twice this depth.
_MAX_DEPTH = 100


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def decode_json(text: str) -> tuple[Any, int]:
    """The JSON value that `text` starts with, and where it ends.

    Raises:
        ValueError, RecursionError: it is no JSON value, or none that can be sent to a tool server.
    """
    value, end = _JSON.raw_decode(text)
    _check_can_be_sent(value)
    return value, end


def _check_can_be_sent(value: Any) -> None:
    """Raise ValueError for JSON that a tool server cannot be sent: it would look like its fault."""
    # A lone surrogate has no UTF-8 form; 1e999 reads as infinity.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()
    depth = deepest = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > _MAX_DEPTH:
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")


def check_arguments(
    arguments: Mapping[str, Any], schema: Mapping[str, Any]
) -> tuple[CallOutcome, str]:
    """Outcome and detail of arguments under a JSON schema: names first, then values."""
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    missing = [name for name in _required(schema) if name not in arguments]
    if missing:
        return CallOutcome.MISSING_ARGUMENT, f"required arguments are missing: {', '.join(missing)}"
    unknown = [name for name in arguments if name not in properties]
    if unknown and not schema.get("additionalProperties"):
        known = ", ".join(properties) or "none"
        shown = ", ".join(unknown)[:200]
        return CallOutcome.UNKNOWN_ARGUMENT, f"unknown arguments: {shown}; known: {known}"
    for name, value in arguments.items():
        expected = properties.get(name)
        if isinstance(expected, Mapping) and not _fits(value, expected):
            return CallOutcome.MISTYPED_ARGUMENT, _mistyped(name, value, expected)
    return CallOutcome.OK, ""


def type_name(value: Any) -> str:
    """JSON's name for the type of `value`."""
    for name, types in _TYPES.items():
        if isinstance(value, types) and not (isinstance(value, bool) and name != "boolean"):
            return name
    return type(value).__name__


def _mistyped(name: str, value: Any, schema: Mapping[str, Any]) -> str:
    if not _has_type(value, schema):
        wanted = schema.get("type", "another type")
        return f"the argument {name!r} must be {wanted}, not {type_name(value)}"
    if isinstance(schema.get("enum"), list):
        allowed = json.dumps(schema["enum"], ensure_ascii=False, default=str)[:500]
        return f"the argument {name!r} must be one of {allowed}"
    return f"the argument {name!r} does not follow the tool's schema"


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """`value` follows `schema`, whose keywords may be anything at all."""
    for key in ("anyOf", "oneOf"):
        options = schema.get(key)
        if isinstance(options, list) and options:
            return any(isinstance(item, Mapping) and _fits(value, item) for item in options)
    if not _has_type(value, schema):
        return False
    allowed = schema.get("enum")
    if isinstance(allowed, list) and not any(_is_same(value, item) for item in allowed):
        return False
    if "const" in schema and not _is_same(value, schema["const"]):
        return False
    if isinstance(value, list):
        items = schema.get("items")
        return not isinstance(items, Mapping) or all(_fits(item, items) for item in value)
    return not isinstance(value, dict) or _object_fits(value, schema)


def _object_fits(value: dict[str, Any], schema: Mapping[str, Any]) -> bool:
    if any(name not in value for name in _required(schema)):
        return False
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    if schema.get("additionalProperties") is False and not set(value) <= set(properties):
        return False
    return all(
        _fits(item, properties[name])
        for name, item in value.items()
        if isinstance(properties.get(name), Mapping)
    )


def _required(schema: Mapping[str, Any]) -> list[str]:
    required = schema.get("required")
    return [str(name) for name in required] if isinstance(required, list) else []


def _is_same(value: Any, other: Any) -> bool:
    """Equal in JSON: true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _has_type(value: Any, schema: Mapping[str, Any]) -> bool:
    declared = schema.get("type")
    names = declared if isinstance(declared, list) else [declared]
    return any(_is_a(value, name) for name in names)


def _is_a(value: Any, name: Any) -> bool:
    if not isinstance(name, str) or name not in _TYPES:
        return True  # not declared, or a type that JSON schema does not have: nothing to hold to
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name])
