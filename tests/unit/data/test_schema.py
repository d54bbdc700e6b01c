"""Proves that the eight configs have the names, rows and types of MATPO-data's dataset card.

`card_features.txt` is a transcript of the card: fields in order, with the types of the leaves.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from megatron_matpo.data.schema import (
    CONFIGS,
    DataSet,
    arrow_schema,
    differences,
    parse_name,
    shape_of,
)

CARD = Path(__file__).parent / "card_features.txt"


def card() -> dict[str, tuple[int, str]]:
    """Config -> (rows, fields)."""
    found: dict[str, tuple[int, str]] = {}
    name = ""
    for line in CARD.read_text().splitlines():
        if line.startswith(" "):
            rows, fields = found[name]
            found[name] = rows, f"{fields} {line.strip()}".strip()
        else:
            name, num_rows = line.split()
            found[name] = int(num_rows), ""
    return found


def flat(field: pa.Field) -> list[str]:
    kind = field.type
    if pa.types.is_struct(kind):
        return [field.name, *(word for inner in kind for word in flat(inner))]
    if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
        return [field.name, *(word for inner in kind.value_type for word in flat(inner))]
    if pa.types.is_list(kind):
        return [f"{field.name}=list<{kind.value_type}>"]
    return [f"{field.name}={kind}"]


def test_the_eight_configs_are_those_of_the_card() -> None:
    assert {name: config.num_rows for name, config in CONFIGS.items()} == {
        name: rows for name, (rows, _) in card().items()
    }


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_types_are_those_of_the_card(name: str) -> None:
    schema = arrow_schema(CONFIGS[name])
    assert " ".join(word for field in schema for word in flat(field)) == card()[name][1]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_schema_differs_from_itself_in_nothing_and_from_each_other_one(name: str) -> None:
    own = CONFIGS[name].shape
    found = {field.name: shape_of(field.type) for field in arrow_schema(CONFIGS[name])}
    assert differences(own, found) == []
    for other in CONFIGS.values():
        assert bool(differences(own, other.shape)) == (other.shape != own)


def test_widths_and_empty_columns_are_no_differences() -> None:
    """What other writers than ours make of the same data."""
    wide = pa.struct(
        [
            ("a", pa.dictionary(pa.int32(), pa.large_string())),
            ("b", pa.large_list(pa.null())),
            ("c", pa.null()),
        ]
    )
    assert differences({"a": "string", "b": ("string",), "c": {"d": "int64"}}, shape_of(wide)) == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"a": "int64"}, [("x.a", "expected text, got integer")]),
        ({"a": ("string",)}, [("x.a", "expected text, got list of text")]),
        ({}, [("x.a", "missing; expected text")]),
        ({"a": "string", "b": "bool"}, [("x.b", "not a field of this config")]),
        ("string", [("x", "expected record of a, got text")]),
    ],
)
def test_differences_are_named(found: object, expected: list[tuple[str, str]]) -> None:
    assert differences({"x": {"a": "string"}}, {"x": found}) == expected  # type: ignore[dict-item]


def test_names_say_source_mode_and_copies() -> None:
    assert parse_name("single_agent_val_frames_repeat_5") == DataSet("frames", "single_agent", 5)
    assert parse_name("matpo_train_musique") == DataSet("musique", "matpo", 1)
    for name in ("matpo_val_musique", "matpo_val_gaia_repeat_1", "matpo_val_gaia_repeat_0", "gaia"):
        assert parse_name(name) is None
