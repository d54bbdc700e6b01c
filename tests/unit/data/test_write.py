"""Proves that all eight configs round-trip, and what a rewriting of prompts keeps and refuses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_matpo.data.check import check_set
from megatron_matpo.data.dataset import read_questions
from megatron_matpo.data.locate import find_files
from megatron_matpo.data.raw.questions import rows_of
from megatron_matpo.data.raw.sources import select
from megatron_matpo.data.schema import CONFIGS, DataSet, arrow_schema
from megatron_matpo.data.write import ROWS_PER_GROUP, rewrite_prompts, write_set
from megatron_matpo.errors import DataError
from tests.unit.data.raw.test_sources import OPTIONS, RAW

SYSTEM = "Plan.\n## Server name: browsing_agent\n### Tool name: search_and_browse\n"


def build_rows(config: DataSet) -> list[dict[str, Any]]:
    chosen = select(config.family, str(RAW[config.family]), OPTIONS)
    return list(rows_of(chosen.questions, config, SYSTEM, config.family))


def content(file: Path) -> bytes:
    """The rows as bytes, schema included."""
    sink = pa.BufferOutputStream()
    table = pq.read_table(file).combine_chunks()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_config_round_trips(tmp_path: Path, name: str) -> None:
    """Write, read, write: the same rows and types, and the same file to the byte."""
    config = CONFIGS[name]
    first = write_set(tmp_path / "a", config, build_rows(config), replace=False)
    assert first == tmp_path / "a" / name / "train-00000-of-00001.parquet"
    table = pq.read_table(first)
    assert table.schema.equals(arrow_schema(config), check_metadata=True)
    second = write_set(tmp_path / "b", config, table.to_pylist(), replace=False)
    assert content(first) == content(second)
    assert first.read_bytes() == second.read_bytes()
    assert table.to_pylist() == build_rows(config)
    found = check_set(name, str(tmp_path / "a"))
    assert found.problems == []
    assert set(found.copies) == {config.repeat}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_config_is_read_with_what_evaluation_needs(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    rows = build_rows(config)
    write_set(tmp_path, config, rows, replace=False)
    questions = read_questions(name, tmp_path)
    assert [item.row for item in questions] == list(range(len(rows)))
    answers = [row["extra_info"]["answer"] for row in rows]
    assert [item.ground_truth for item in questions] == answers
    assert len({item.key for item in questions}) * config.repeat == len(rows)
    assert len({id(item.system) for item in questions}) == 1  # one copy in memory
    labels = {(item.level, item.question_type) for item in questions}
    assert (
        labels
        == {
            "musique": {("", "2hop"), ("", "3hop1"), ("", "4hop1")},
            "gaia": {("1", "text"), ("2", "text"), ("3", "text")},
            "frames": {
                ("", "Numerical reasoning | Multiple constraints"),
                ("", "Temporal reasoning"),
                ("", "Tabular reasoning"),
            },
            "webwalkerqa": {
                ("easy", "single_source"),
                ("hard", "multi_source"),
                ("medium", "multi_source"),
            },
        }[config.family]
    )


def test_row_groups_bound_what_is_held(tmp_path: Path) -> None:
    config = CONFIGS["matpo_train_musique"]
    rows = itertools.islice(itertools.cycle(build_rows(config)), 2 * ROWS_PER_GROUP + 1)
    file = write_set(tmp_path, config, rows, replace=False)
    metadata = pq.read_metadata(file)
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sizes == [ROWS_PER_GROUP, ROWS_PER_GROUP, 1]


def test_writing_replaces_only_when_told_and_leaves_nothing_half(tmp_path: Path) -> None:
    config = CONFIGS["matpo_train_musique"]
    rows = build_rows(config)
    file = write_set(tmp_path, config, rows, replace=False)
    before = file.read_bytes()
    with pytest.raises(DataError, match="exists; --replace overwrites it"):
        write_set(tmp_path, config, rows, replace=False)

    def broken() -> Any:
        yield rows[0]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError):
        write_set(tmp_path, config, broken(), replace=True)
    assert file.read_bytes() == before
    assert write_set(tmp_path, config, rows[:1], replace=True) == file
    assert pq.read_metadata(file).num_rows == 1
    assert [item.name for item in file.parent.iterdir()] == [file.name]
    (file.parent / "train-00001-of-00002.parquet").touch()
    with pytest.raises(DataError, match=r"holds train-00001-of-00002\.parquet"):
        write_set(tmp_path, config, rows, replace=True)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = CONFIGS["matpo_train_musique"]
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet: cannot be written"):
        write_set(tmp_path / "file", config, build_rows(config), replace=False)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Two files as others write them: wide types, metadata, small row groups, zstd."""
    config = CONFIGS["matpo_val_frames_repeat_2"]
    table = pa.Table.from_pylist(build_rows(config), schema=arrow_schema(config))
    names = table.schema.names
    wide = table.schema.field("ability").with_type(pa.large_string())
    table = table.cast(table.schema.set(names.index("ability"), wide))
    table = table.replace_schema_metadata({"huggingface": '{"info": {"features": {}}}'})
    folder = tmp_path / "src"
    folder.mkdir()
    for index, part in enumerate((table.slice(0, 4), table.slice(4))):
        file = folder / f"train-0000{index}-of-00002.parquet"
        pq.write_table(part, file, row_group_size=3, compression="zstd")
    return find_files(folder)


def test_rewriting_changes_system_messages_and_nothing_else(
    tmp_path: Path, shards: list[Path]
) -> None:
    done = rewrite_prompts(shards, tmp_path / "dst", "New.")
    assert (done.num_rows, done.num_changed, dict(done.old_prompts)) == (6, 6, {SYSTEM: 6})
    assert done.files == find_files(tmp_path / "dst")
    for source, target in zip(shards, done.files, strict=True):
        old, new = pq.ParquetFile(source), pq.ParquetFile(target)
        assert new.schema_arrow.equals(old.schema_arrow, check_metadata=True)
        assert new.metadata.num_row_groups == old.metadata.num_row_groups
        assert new.metadata.row_group(0).column(0).compression == "ZSTD"
        before, after = old.read(), new.read()
        assert after.drop_columns("prompt").equals(before.drop_columns("prompt"))
        for was, now in zip(before["prompt"].to_pylist(), after["prompt"].to_pylist(), strict=True):
            assert now == [{"content": "New.", "role": "system"}, was[1]]
    again = rewrite_prompts(done.files, tmp_path / "back", SYSTEM)
    assert [content(file) for file in again.files] == [content(file) for file in shards]
    same = rewrite_prompts(shards, tmp_path / "same", SYSTEM)
    assert same.num_changed == 0


def test_one_file_is_rewritten_into_one_file(tmp_path: Path, shards: list[Path]) -> None:
    done = rewrite_prompts(shards[:1], tmp_path / "deep" / "dst.parquet", "New.")
    assert done.files == [tmp_path / "deep" / "dst.parquet"]
    assert {item.system for item in read_questions(done.files[0])} == {"New."}


def test_a_rewriting_never_touches_its_source(tmp_path: Path, shards: list[Path]) -> None:
    before = [file.read_bytes() for file in shards]
    link = tmp_path / "link"
    link.symlink_to(shards[0].parent)
    with pytest.raises(DataError, match="is the source"):
        rewrite_prompts(shards, link, "New.")
    with pytest.raises(DataError, match="is the source"):
        rewrite_prompts(shards[:1], shards[0], "New.")
    (tmp_path / "there").mkdir()
    with pytest.raises(DataError, match="there: exists; name a new"):
        rewrite_prompts(shards, tmp_path / "there", "New.")
    with pytest.raises(DataError, match="2 files are rewritten into a folder"):
        rewrite_prompts(shards, tmp_path / "x.parquet", "New.")
    assert [file.read_bytes() for file in shards] == before


def test_a_row_that_cannot_be_rewritten_leaves_no_copy(tmp_path: Path, shards: list[Path]) -> None:
    rows = pq.read_table(shards[1]).to_pylist()
    rows[1]["prompt"].reverse()
    pq.write_table(pa.Table.from_pylist(rows), shards[1])
    with pytest.raises(DataError, match=r"00002\.parquet: row 1: prompt: expected \['system'"):
        rewrite_prompts(shards, tmp_path / "dst", "New.")
    odd = {"prompt": ["plan"], "data_source": "x", "reward_model": None, "extra_info": None}
    for prompt in (["plan", "ask"], "plan", None, [{"role": "system"}, {"role": "user"}]):
        pq.write_table(pa.Table.from_pylist([odd | {"prompt": prompt}]), shards[1])
        with pytest.raises(DataError, match=r"row 0: prompt: expected \['system', 'user'\], got"):
            rewrite_prompts(shards, tmp_path / "dst", "New.")
    shards[1].write_bytes(b"PAR1 not")
    with pytest.raises(DataError, match=r"00002\.parquet: cannot be rewritten"):
        rewrite_prompts(shards, tmp_path / "dst", "New.")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["src"]
