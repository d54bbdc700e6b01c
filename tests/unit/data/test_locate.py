"""Proves that data sets are found by name, file and folder, and that half a data set is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_matpo.data.locate import find_files, named_config
from megatron_matpo.data.schema import CONFIGS
from megatron_matpo.errors import DataError


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names(files: list[Path], folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in files]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_config_is_found_by_name(tmp_path: Path, name: str) -> None:
    make(tmp_path, f"{name}/train-00000-of-00001.parquet")
    assert names(find_files(name, tmp_path), tmp_path) == [f"{name}/train-00000-of-00001.parquet"]


def test_shards_come_in_order_and_other_files_of_the_folder_do_not(tmp_path: Path) -> None:
    shards = [f"x/train-{i:05d}-of-00003.parquet" for i in (2, 0, 1)]
    make(tmp_path, *shards, "x/README.md", "x/test-00000-of-00001.parquet")
    assert names(find_files("x", tmp_path), tmp_path) == sorted(shards)


def test_a_config_may_be_one_file(tmp_path: Path) -> None:
    make(tmp_path, "matpo_train_musique.parquet")
    found = find_files("matpo_train_musique", tmp_path)
    assert names(found, tmp_path) == ["matpo_train_musique.parquet"]


def test_paths_need_no_folder(tmp_path: Path) -> None:
    make(tmp_path, "a.parquet", "b.parquet")
    assert find_files(tmp_path) == [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    assert find_files(str(tmp_path / "b.parquet"), "no/such/folder") == [tmp_path / "b.parquet"]


def test_a_name_comes_before_a_path_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "here/x/a.parquet", "data/x/b.parquet")
    monkeypatch.chdir(tmp_path / "here")
    assert find_files("x", tmp_path / "data") == [tmp_path / "data/x/b.parquet"]
    assert find_files("x", "") == [Path("x/a.parquet")]


@pytest.mark.parametrize(
    ("value", "folder", "message"),
    [
        ("matpo_trian_musique", "data", "that folder has: matpo_train_musique, mine; configs of"),
        ("matpo_train_musique", "", "no such file or folder; set data.folder to where it lies"),
        ("matpo_train_musique", "nowhere", "data.folder=nowhere is not a folder"),
        ("some/path", "data", "some/path: no such file or folder"),
        ("", "data", "expected a parquet file, a folder of them, or a name"),
        ("empty", "data", r"has no \*\.parquet file"),
        ("half", "data", r"train-00001-of-00003\.parquet is missing; 2 of 3 shards are there"),
        ("mixed", "data", r"shards of several data sets lie together: train-\*-of-00001"),
        ("both", "data", r"has both both/ and both\.parquet"),
    ],
)
def test_what_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, folder: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data", "matpo_train_musique/train-00000-of-00001.parquet", "mine.parquet")
    if value in ("empty", "half", "mixed", "both"):
        make(tmp_path / "data", "empty/x.txt", "both/a.parquet", "both.parquet")
        make(tmp_path / "data", *(f"half/train-{i:05d}-of-00003.parquet" for i in (0, 2)))
        make(tmp_path / "data", "mixed/train-00000-of-00001.parquet")
        make(tmp_path / "data", *(f"mixed/train-{i:05d}-of-00002.parquet" for i in (0, 1)))
    with pytest.raises(DataError, match=message):
        find_files(value, folder)


def test_which_config_a_data_set_is_called_after() -> None:
    config = CONFIGS["matpo_val_gaia_repeat_8"]
    for value in (config.name, f"x/{config.name}", f"x/{config.name}.parquet"):
        assert named_config(value) == config
    assert named_config(f"{config.name}/train-00000-of-00001.parquet") == config
    assert named_config("examples/matpo_train.parquet") is None
