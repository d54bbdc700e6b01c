"""The eight configs of MATPO-data: names, row counts and column types, in one place.

Types are written as plain values and become Arrow types on demand, because a replay must not need
pyarrow: a text is the name of a primitive type, a tuple of one is a list, a dict is a struct.

Source: the dataset card of `veggiebird/MATPO-data`. Two families differ in `extra_info`: MuSiQue
and GAIA have an integer `index` and an always empty `evidence_list`, FRAMES and WebWalkerQA a text
`index` and `metadata`. `tools_kwargs` names `search_and_browse` only in the `matpo` variants of the
latter.
"""

from __future__ import annotations

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (`pyarrow` has no type information.)
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Shape = str | tuple["Shape"] | Mapping[str, "Shape"]
"""A column's type: `"string"`, `("string",)` is a list of them, a mapping is a struct."""

MODES = ("matpo", "single_agent")
SPLIT = "train"
"""Every config of MATPO-data has this one split, evaluation sets too."""

_KWARGS: Shape = {"create_kwargs": {"ground_truth": "string"}}
_SEARCH: Mapping[str, Shape] = {"google_search": _KWARGS, "scrape": _KWARGS}
_BROWSE: Mapping[str, Shape] = {**_SEARCH, "search_and_browse": _KWARGS}
_MESSAGES: Shape = ({"content": "string", "role": "string"},)
_BODY: Mapping[str, Shape] = {
    "data_source": "string",
    "prompt": _MESSAGES,
    "ability": "string",
    "reward_model": {"ground_truth": "string", "style": "string"},
}
_MUSIQUE_EXTRA: Mapping[str, Shape] = {
    "answer": "string",
    "evidence_list": ("null",),
    "index": "int64",
    "need_tools_kwargs": "bool",
    "question": "string",
    "question_type": "string",
    "split": "string",
    "tools_kwargs": _SEARCH,
}
_METADATA: Mapping[str, Mapping[str, Shape]] = {
    "frames": {
        "level": "int64",
        "reasoning_types": "string",
        "row_number": "int64",
        "source": "string",
        "wiki_links": ("string",),
    },
    "webwalkerqa": {
        "difficulty_level": "string",
        "domain": "string",
        "golden_path": ("string",),
        "lang": "string",
        "source_website": ("string",),
        "type": "string",
    },
}


@dataclass(frozen=True, slots=True)
class DataSet:
    """One config of MATPO-data, or one that `matpo data build` makes in its likeness."""

    family: str
    """`musique | gaia | frames | webwalkerqa`: where the questions come from."""
    mode: str
    """`matpo` (the planner delegates) or `single_agent` (it searches by itself)."""
    repeat: int = 1
    """Physical copies of each question."""

    @property
    def name(self) -> str:
        """As in MATPO-data: `matpo_val_gaia_repeat_8`."""
        copies = f"_repeat_{self.repeat}" if self.repeat > 1 else ""
        return f"{self.mode}_{self.purpose}_{self.family}{copies}"

    @property
    def purpose(self) -> str:
        """`train` for MuSiQue, `val` for the others."""
        return "train" if self.family == "musique" else "val"

    @property
    def num_rows(self) -> int:
        """Rows on the dataset card; 0 if the card has no such config."""
        return _CARD_ROWS.get(self.family, 0) if self.repeat == REPEATS[self.family] else 0

    @property
    def shape(self) -> Mapping[str, Shape]:
        """Columns and their types, in order."""
        if self.family in _METADATA:
            kwargs = _BROWSE if self.mode == "matpo" else _SEARCH
            extra: Mapping[str, Shape] = {
                "answer": "string",
                "index": "string",
                "metadata": _METADATA[self.family],
                "need_tools_kwargs": "bool",
                "question": "string",
                "split": "string",
                "tools_kwargs": kwargs,
            }
            return {**_BODY, "extra_info": extra}
        head: Mapping[str, Shape] = {"dataset": "string"}
        if self.family == "gaia":
            head = {**head, "level": "int64", "task_id": "string"}
        return {**head, **_BODY, "extra_info": _MUSIQUE_EXTRA}


REPEATS: Mapping[str, int] = {"musique": 1, "frames": 2, "gaia": 8, "webwalkerqa": 2}
"""Copies of each question in MATPO-data, by family."""
_CARD_ROWS = {"musique": 6175, "frames": 1648, "gaia": 824, "webwalkerqa": 1360}
CONFIGS: Mapping[str, DataSet] = {
    item.name: item
    for mode in MODES
    for family, repeat in REPEATS.items()
    for item in (DataSet(family, mode, repeat),)
}
"""The eight configs by name."""
_NAME = re.compile(
    rf"(?P<mode>{'|'.join(MODES)})_(?:train|val)_(?P<family>{'|'.join(REPEATS)})"
    r"(?:_repeat_(?P<copies>[1-9]\d{0,3}))?"
)


def parse_name(name: str) -> DataSet | None:
    """The data set of this name, also with other numbers of copies than MATPO-data has."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    found = DataSet(match["family"], match["mode"], int(match["copies"] or 1))
    return found if found.name == name else None


@lru_cache(maxsize=32)
def arrow_schema(config: DataSet) -> Any:
    """The `pyarrow.Schema` of a config."""
    import pyarrow as pa

    return pa.schema([(name, _arrow_type(shape)) for name, shape in config.shape.items()])


def describe(shape: Shape) -> str:
    """A type for a message: `text`, `integer`, `list of text`, `record of answer, index`."""
    if isinstance(shape, str):
        return {"string": "text", "int64": "integer", "bool": "true or false"}.get(shape, shape)
    if isinstance(shape, tuple):
        return f"list of {describe(shape[0])}"
    return f"record of {', '.join(shape)}"


def shape_of(arrow_type: Any) -> Shape:
    """The shape of an Arrow type; text types of other widths count as text."""
    import pyarrow as pa

    if pa.types.is_dictionary(arrow_type):
        return shape_of(arrow_type.value_type)
    if pa.types.is_struct(arrow_type):
        return {field.name: shape_of(field.type) for field in arrow_type}
    if pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type):
        return (shape_of(arrow_type.value_type),)
    if pa.types.is_large_string(arrow_type) or pa.types.is_string_view(arrow_type):
        return "string"
    return str(arrow_type)


def differences(expected: Shape, found: Shape, path: str = "") -> list[tuple[str, str]]:
    """Where `found` is not `expected`: (dotted field, what was expected and what is there).

    The order of a struct's fields does not count. A list of nulls and a list of anything are the
    same to readers (a column without a single value has no type), and so is a null column.
    """
    if found == "null" or expected == "null":
        return []
    if isinstance(expected, str) or isinstance(found, str):
        if expected == found:
            return []
        return [(path, f"expected {describe(expected)}, got {describe(found)}")]
    if isinstance(expected, tuple) or isinstance(found, tuple):
        if isinstance(expected, tuple) and isinstance(found, tuple):
            return differences(expected[0], found[0], f"{path}[]")
        return [(path, f"expected {describe(expected)}, got {describe(found)}")]
    result: list[tuple[str, str]] = []
    for name, shape in expected.items():
        where = f"{path}.{name}" if path else name
        if name not in found:
            result.append((where, f"missing; expected {describe(shape)}"))
        else:
            result += differences(shape, found[name], where)
    extra = [name for name in found if name not in expected]
    for name in extra:
        where = f"{path}.{name}" if path else name
        result.append((where, "not a field of this config"))
    return result


def _arrow_type(shape: Shape) -> Any:
    import pyarrow as pa

    if isinstance(shape, str):
        return {
            "string": pa.string(),
            "int64": pa.int64(),
            "bool": pa.bool_(),
            "null": pa.null(),
        }[shape]
    if isinstance(shape, tuple):
        # Parquet's own name for items; any other one would come back as this.
        return pa.list_(pa.field("element", _arrow_type(shape[0])))
    return pa.struct([(name, _arrow_type(item)) for name, item in shape.items()])
