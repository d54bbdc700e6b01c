"""Proves that results survive crashes, and that changed models and rows are noticed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from megatron_matpo.data.dataset import Question
from megatron_matpo.errors import ConfigError, DataError
from megatron_matpo.evaluation.inputs import (
    Inputs,
    has_results,
    merge_inputs,
    model_fingerprint,
    read_inputs,
    results_path,
    row_hash,
    set_fingerprint,
    write_inputs,
)
from megatron_matpo.evaluation.results import ResultsFile, episode_results, number_samples
from tests.helpers.episodes import make_batch
from tests.helpers.evaluation import result


def test_results_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    first = [result(1, 0, 0.5, answer="caf\u00e9 \u4e2d"), result(0, 1, None)]
    ResultsFile(path).append(first)
    again = ResultsFile(path)
    assert again.results == [first[1], first[0]], "in the order of rows"
    again.append([result(0, 1, 1.0)])
    assert [item.accuracy for item in again.results] == [1.0, 0.5], "the last line counts"
    assert [item.accuracy for item in ResultsFile(path).results] == [1.0, 0.5]
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("torn", ['{"row": 7', '{"row": 7}', "\x00\x00"])
def test_a_line_that_a_crash_cut_short_is_removed(tmp_path, torn):
    path = tmp_path / "results.jsonl"
    ResultsFile(path).append([result(0)])
    with path.open("a") as file:
        file.write(torn)
    file = ResultsFile(path)
    file.append([result(1)])
    assert [item.row for item in ResultsFile(path).results] == [0, 1]


def test_a_lone_surrogate_from_a_tokenizer_does_not_break_the_file(tmp_path):
    path = tmp_path / "results.jsonl"
    ResultsFile(path).append([result(0, answer="\ud800")])
    assert ResultsFile(path).results[0].answer == "?"


def test_a_file_of_another_version_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"row": 0}) + "\n")
    with pytest.raises(DataError, match=r"results\.jsonl: line 1: .*another run\.name"):
        ResultsFile(path)


def test_results_of_a_batch():
    batch = make_batch(3)
    results = episode_results(batch, [f"hash {row}" for row in range(4)])
    episodes = [(group, episode) for group in batch.groups for episode in group.episodes]
    assert len(results) == len(episodes)
    for item, (group, episode) in zip(results, episodes, strict=True):
        assert (item.row, item.sample) == (group.row_index, episode.sample_index)
        assert item.row_hash == f"hash {group.row_index}"
        assert item.accuracy == (episode.reward and episode.reward.accuracy)
        assert item.num_workers == len(episode.workers)
        assert item.context_tokens == sum(len(t.token_ids) for t in episode.trajectories)
        assert bool(item.failure) == (item.accuracy is None)


def test_samples_get_the_numbers_that_were_missing():
    batch = make_batch(3)
    wanted = {g.row_index: [10 + i for i in range(len(g.episodes))] for g in batch.groups}
    for group in number_samples(batch, wanted).groups:
        assert [episode.sample_index for episode in group.episodes] == wanted[group.row_index]
        assert [e.id for e in group.episodes] == [
            e.id for e in batch.groups[group.row_index].episodes
        ]
    with pytest.raises(ValueError, match=r"longer|shorter"):
        number_samples(batch, {row: [0] * 99 for row in wanted})


QUESTION = Question("system", "user", "question", "truth", "source")


@pytest.mark.parametrize("field", ["system", "user", "ground_truth", "data_source"])
def test_a_row_is_another_one_if_any_text_differs(field):
    assert row_hash(QUESTION) == row_hash(replace(QUESTION, level="2", row=7))
    assert row_hash(QUESTION) != row_hash(replace(QUESTION, **{field: "other"}))


def test_a_set_is_another_one_if_rows_differ_or_move():
    other = replace(QUESTION, user="other")
    prints = {set_fingerprint(rows) for rows in ([QUESTION, other], [other, QUESTION], [QUESTION])}
    assert len(prints) == 3


def test_a_model_is_known_by_its_contents(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    weights = bytearray(range(256)) * 64 * 1024  # 16 MiB: more than 64 blocks
    (model / "model.safetensors").write_bytes(weights)
    (model / "config.json").write_text("{}")
    before = model_fingerprint(model)
    shutil.copytree(model, tmp_path / "copy")
    assert model_fingerprint(tmp_path / "copy") == before, "a copy is the same model"
    (model / "README.md").write_text("anything")
    assert model_fingerprint(model) == before
    trained = bytes(255 - value for value in weights)
    (model / "model.safetensors").write_bytes(trained)
    assert model_fingerprint(model) != before
    (model / "model.safetensors").write_bytes(weights[:-1] + b"\x00")
    assert model_fingerprint(model) != before, "the last byte is looked at"
    (model / "model.safetensors").write_bytes(weights)
    (model / "config.json").write_text("{ }")
    assert model_fingerprint(model) != before


def test_inputs_are_kept_and_compared(tmp_path):
    assert read_inputs(tmp_path) is None and not has_results(tmp_path)
    inputs = Inputs("m", {"a": "1", "b": "2"})
    write_inputs(tmp_path, inputs)
    assert read_inputs(tmp_path) == inputs
    ResultsFile(results_path(tmp_path, "a")).append([result()])
    assert has_results(tmp_path)


def merge(before, now, accept=False):
    return merge_inputs(before, now, "name", accept_changes=accept)


def test_more_sets_may_be_added_and_others_left_out():
    before = Inputs("m", {"a": "1"})
    assert merge(before, Inputs("m", {"b": "2"})) == Inputs("m", {"a": "1", "b": "2"})
    assert merge(None, Inputs("m", {"b": "2"})) == Inputs("m", {"b": "2"})


def test_another_model_or_changed_rows_must_be_accepted():
    before, now = Inputs("m", {"a": "1"}), Inputs("n", {"a": "2"})
    with pytest.raises(ConfigError) as caught:
        merge(before, now)
    lines = str(caught.value).splitlines()
    assert "run.name=name" in lines[0] and "--accept-changes" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["model.path", "eval.sets"]
    accepted = merge(before, now, accept=True)
    assert accepted == Inputs("n", {"a": "2"}, has_mixed_settings=True)
    assert merge(accepted, now).has_mixed_settings, "once mixed, always mixed"
