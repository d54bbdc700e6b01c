"""Supervised samples: loss exactly on assistant turns, the tokens of a rollout, errors that point.

Uses the example policy's tokenizer and template.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_matpo.data.conversations import batch_indices, read_conversations
from megatron_matpo.data.tokenizer import Tokenizer
from megatron_matpo.errors import DataError

POLICY = Path(__file__).parents[3] / "examples" / "smallworld" / "policy"
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "Let me see."},
    {"role": "user", "content": "first reply"},
    {"role": "user", "content": "second reply"},
    {"role": "assistant", "content": "\\boxed{here}"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(POLICY)


def write(path, *objects):
    path.write_text("".join(json.dumps(item) + "\n" for item in objects))
    return str(path)


def test_loss_is_on_assistant_turns_only(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", {"id": "x", "role": "worker", "messages": CONVERSATION})
    (sample,) = read_conversations(file, tokenizer, 1000)
    trained = [t for t, m in zip(sample.labels, sample.loss_mask, strict=True) if m]
    assert tokenizer.decode(trained) == "Let me see.<|im_end|>\\boxed{here}<|im_end|>"
    whole = [sample.input_ids[0], *sample.labels]
    assert tokenizer.decode(whole) + "\n" == tokenizer.render(CONVERSATION, False)
    assert sample.trajectory_id == "x"
    assert sample.role == "worker"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("not json", "not valid JSON"),
        ('{"id": 1}', '"messages"'),
        ('{"messages": [{"role": "user", "content": 3}]}', r"messages\[0\]"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "an assistant turn last"),
        ('{"role": "boss", "messages": []}', "planner or worker"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},'
            ' {"role": "tool", "content": "c"}, {"role": "assistant", "content": "d"}]}',
            r"messages\[2\] has role 'tool'",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},'
            ' {"role": "assistant", "content": "c"}]}',
            r"messages\[2\]",
        ),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, tokenizer, line, what):
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"messages": CONVERSATION})
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=what) as caught:
        read_conversations(str(path), tokenizer, 1000)
    assert f"{path}: line 2" in str(caught.value)


def test_too_long_names_the_setting(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", {"messages": CONVERSATION})
    with pytest.raises(DataError, match=r"rollout\.context_length=5"):
        read_conversations(file, tokenizer, 5)


@pytest.mark.parametrize(("num_rows", "batch"), [(10, 4), (7, 7), (5, 12)])
def test_every_epoch_visits_each_row_once(num_rows, batch):
    drawn = [
        row for step in range(1, num_rows + 1) for row in batch_indices(num_rows, batch, 3, step)
    ]
    assert len(drawn) == num_rows * batch
    for epoch in range(batch):
        assert Counter(drawn[epoch * num_rows : (epoch + 1) * num_rows]) == Counter(range(num_rows))
    assert batch_indices(num_rows, batch, 3, 2) == batch_indices(num_rows, batch, 3, 2)
    assert batch_indices(50, 20, 3, 1) != batch_indices(50, 20, 4, 1)
