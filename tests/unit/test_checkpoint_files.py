"""The folder of checkpoints: which are deleted, which is taken, what a manifest catches."""

from __future__ import annotations

import json

import pytest

from megatron_matpo import checkpoint_files as files
from megatron_matpo.errors import CheckpointError


def write(root, step, text="data"):
    temporary = files.temporary_folder(root, step)
    files.prepare(temporary)
    (temporary / "a.bin").write_text(text)
    stream = files.HashingFile(temporary / "b.bin")
    stream.write(b"first ")
    stream.write(memoryview(b"second"))
    stream.close()
    files.commit(root, step, {"b.bin": stream.entry()})


def steps(root):
    return sorted(int(path.name[5:]) for path in root.glob("step_*"))


def test_what_was_hashed_on_the_way_equals_what_is_read(tmp_path):
    write(tmp_path, 4)
    folder = tmp_path / "step_4"
    entries = files.read_manifest(folder)
    assert sorted(entries) == ["a.bin", "b.bin"]
    assert entries["b.bin"] == files.hash_file(folder / "b.bin")
    assert entries["b.bin"].num_bytes == 12
    assert list(files.problems(folder, entries, full=True)) == []
    assert files.latest_step(tmp_path) == 4


@pytest.mark.parametrize(
    ("saved", "keep_last", "keep_every", "kept"),
    [
        ([1, 2, 3, 4], 2, 0, [3, 4]),
        ([1, 2, 3, 4], 1, 2, [2, 4]),
        ([2, 4, 6, 8, 9], 2, 4, [4, 6, 8, 9]),
        ([4, 8, 5], 2, 0, [4, 5]),  # went back to 4: 8 is given up
        ([4, 8, 12, 5], 2, 12, [4, 5, 12]),  # a kept one stays even then
    ],
)
def test_prune(tmp_path, saved, keep_last, keep_every, kept):
    for step in saved:
        write(tmp_path, step)
        (tmp_path / "step_99.tmp").mkdir()
        if step == saved[-1]:
            files.prune(tmp_path, step, keep_last=keep_last, keep_every=keep_every)
            break
        (tmp_path / "step_99.tmp").rmdir()
    assert steps(tmp_path) == kept


def test_a_folder_hidden_from_rank_0_is_noticed(tmp_path):
    temporary = files.temporary_folder(tmp_path, 1)
    files.prepare(temporary)
    elsewhere = {"__1_0.distcp": files.FileEntry(10, "00")}
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp was written but is missing.*share"):
        files.commit(tmp_path, 1, elsewhere)
    assert files.latest_step(tmp_path) is None


def test_candidates_are_the_latest_and_older_ones(tmp_path):
    assert files.candidates(tmp_path / "nothing", "latest") == []
    for step in (2, 10, 6):
        write(tmp_path, step)
    names = [path.name for path in files.candidates(tmp_path, "whole")]
    assert names == ["step_6", "step_2"]  # 10 was given up by going back
    assert files.candidates(tmp_path, "step_10") == [tmp_path / "step_10"]
    with pytest.raises(CheckpointError, match="there are step_10, step_6, step_2"):
        files.candidates(tmp_path, "step_7")
    (tmp_path / "step_6").rename(tmp_path / "step_6.old")  # killed between the two renames
    assert files.candidates(tmp_path, "latest")[0] == tmp_path / "step_6.old"
    (tmp_path / "latest").write_text("nonsense")
    with pytest.raises(CheckpointError, match=r"holds 'nonsense'.*checkpoint\.load"):
        files.candidates(tmp_path, "latest")


def test_a_manifest_that_is_damaged_or_of_another_version_is_named(tmp_path):
    write(tmp_path, 1)
    path = tmp_path / "step_1" / files.MANIFEST
    for text in ("{", json.dumps({"a.bin": 4}), json.dumps({"files": {"a.bin": 4}})):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"manifest\.json: damaged, or of another"):
            files.read_manifest(tmp_path / "step_1")
