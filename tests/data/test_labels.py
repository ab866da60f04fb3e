"""Labelled rows: tokens, truncation, labels, and what the micro-batches carry."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import Example
from ftlit.data.classification import ClassificationData
from ftlit.data.formats import RowError
from ftlit.data.formats.classification import Classification
from ftlit.data.labels import LabelTemplate, cut, shortened
from ftlit.data.padding import classifier_tokenizer, closed_template, pad_token
from ftlit.data.store import Examples
from ftlit.errors import ConfigError, DataError
from ftlit.testing import tiny_tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(train, **options):
    data = ClassificationData(train=train, cache=False, **options)
    data.use_tokenizer(tiny_tokenizer())
    data.setup("fit")
    return data


def bert_like():
    """A tokenizer that puts a token before and one after every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return tokenizer


KINDS = [
    ("spam", ("spam",), False),
    (3, ("3",), False),
    (2.0, ("2",), False),
    (True, ("true",), False),
    (["a", "b", "a"], ("a", "b"), True),
    ([], (), True),
]


@pytest.mark.parametrize(("label", "names", "several"), KINDS)
def test_labels_of_rows(label, names, several):
    row = Classification()({"text": "hello", "label": label})
    assert (row.labels, row.several) == (names, several)


@pytest.mark.parametrize("label", [None, " ", float("nan"), {"a": 1}, ["a", None], [2.5]])
def test_what_is_no_label(label):
    with pytest.raises(RowError, match=r"column 'label(\[[01]\])?' must hold a label"):
        Classification()({"text": "hello", "label": label})


def test_every_example_carries_its_label(tmp_path):
    rows = [
        {"text": f"row {n} " + "x" * (n % 7), "label": ["no", "yes"][n % 3 == 0], "weight": 1 + n % 2}
        for n in range(20)
    ]
    data = loaded(write(tmp_path / "r.jsonl", rows), batch_size=4, max_tokens=60, validation=0.2)
    assert data.labels == ["no", "yes"]
    tokenizer, seen = tiny_tokenizer(), 0
    loader = data.step_loader(data.sets["train"], data.planner(), 0)
    for step in loader:
        assert step.totals.weight == sum(batch.target_weights.sum().item() for batch in step.micro_batches)
        for batch in step.micro_batches:
            assert batch.segments.lengths
            assert len(batch.target_ids) == len(batch.segments)
            for place, segment in enumerate(batch.target_segments.tolist()):
                offset, length = batch.segments.offsets[segment], batch.segments.lengths[segment]
                ids = batch.input_ids[0, offset : offset + length].tolist()
                text = tokenizer.decode(ids)
                (row,) = [row for row in rows if row["text"] == text]
                assert data.labels[batch.target_ids[place]] == row["label"]
                assert batch.target_weights[place] == row["weight"]
                assert batch.position_ids[0, offset : offset + length].tolist() == list(range(length))
                seen += 1
    assert seen == len(data.sets["train"]) == 16
    assert len(data.sets["validation:main"]) == 4
    (held_out,) = data.val_dataloader()
    evaluated = [tokenizer.decode(batch.input_ids[0]) for batch in held_out]
    assert sum(text.count("row") for text in evaluated) == 4
    assert sum(len(batch.target_ids) for batch in held_out) == 4
    assert all(tokenizer.decode([0]) not in text for text in evaluated)


def test_several_labels_are_a_row_of_ones(tmp_path):
    rows = [{"text": "a b", "label": ["a", "b"]}, {"text": "none", "label": []}, {"text": "b", "label": "b"}]
    data = loaded(write(tmp_path / "r.jsonl", rows))
    assert data.multi_label
    assert data.sets["train"].labels.tolist() == [[1, 1], [0, 0], [0, 1]]
    assert "a, b" in data.rendered(0)


def test_numbers_are_in_their_order_and_given_labels_win(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"text": "x", "label": n} for n in (10, 9, 2)])
    assert loaded(path).labels == ["2", "9", "10"]
    assert loaded(path, labels=[10, 2, 9, True]).labels == ["10", "2", "9", "true"]
    assert loaded(path, labels=["10", "2", "9", "1"]).sets["train"].labels.tolist() == [0, 2, 1]


def test_splits_of_one_data_set_keep_their_own_labels(tmp_path):
    """Training and validation rows go by one name there."""
    datasets = pytest.importorskip("datasets")
    rows = {
        "train": [{"text": f"t{n}", "label": "ab"[n % 2]} for n in range(6)],
        "validation": [{"text": f"v{n}", "label": "b"} for n in range(3)],
    }
    made = {split: datasets.Dataset.from_list(some) for split, some in rows.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "set")
    data = loaded(str(tmp_path / "set"), validation=str(tmp_path / "set"))
    assert data.sets["train"].labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.sets["validation:main"].labels.tolist() == [1, 1, 1]


def test_the_fingerprint_is_of_the_labels_too(tmp_path):
    one = loaded(write(tmp_path / "a.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]))
    other = loaded(write(tmp_path / "b.jsonl", [{"text": "x", "label": "b"}, {"text": "y", "label": "a"}]))
    assert one.fingerprint() != other.fingerprint()


def test_what_is_wrong_is_said(tmp_path):
    rows = [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]
    path, alike = write(tmp_path / "r.jsonl", rows), write(tmp_path / "one.jsonl", rows[:1] * 2)
    with pytest.raises(DataError, match="one label for all rows"):
        loaded(alike)
    with pytest.raises(DataError, match=r"held.jsonl, row 1: the label 'c' is not one of the training rows'"):
        loaded(path, validation=write(tmp_path / "held.jsonl", [{"text": "z", "label": "c"}]))
    several = write(tmp_path / "several.jsonl", [{"text": "z", "label": ["a", "b"]}])
    with pytest.raises(
        DataError, match=r"several.jsonl, row 1: column 'label' must hold one label, as in the training"
    ):
        loaded(path, validation=several)
    (tmp_path / "notes.txt").write_text("x\n")
    with pytest.raises(ConfigError, match=r"notes.txt: RawText reads no labels"):
        loaded(str(tmp_path / "notes.txt"))
    with pytest.raises(DataError, match=r"such as data.columns: \{text: body, label: topic\}"):
        loaded(write(tmp_path / "other.jsonl", [{"body": "x", "topic": "a"}]))
    with pytest.raises(DataError, match=r"such as data.columns: \{label: LABEL\}"):
        loaded(write(tmp_path / "none.jsonl", [{"text": "x"}]))
    with pytest.raises(DataError, match="label 'a', which is not in"):
        loaded(path, labels=["b", "c"])
    with pytest.raises(ConfigError, match="at least two different labels"):
        ClassificationData(train=path, labels=["a", "a"])
    with pytest.raises(ConfigError, match="train_on is about answers"):
        ClassificationData(train=path, train_on="last")
    with pytest.raises(DataError, match="column 'text' must hold non-empty text"):
        loaded(write(tmp_path / "bad.jsonl", [{"text": "", "label": "a"}]))


def test_tokens_are_those_of_plain_transformers():
    plain, framed = tiny_tokenizer(), bert_like()
    from ftlit.data.formats import Completion, Conversation, Message, Text

    assert LabelTemplate(framed).tokens(Text("hi")) == framed("hi")["input_ids"]
    assert LabelTemplate(framed).ends() == ([1], [2])
    turns = (Message("user", "hi"), Message("assistant", "yes"))
    closed = classifier_tokenizer(plain, 0)
    theirs = closed.apply_chat_template([turn.turn() for turn in turns], tokenize=True, return_dict=False)
    assert LabelTemplate(plain).tokens(Conversation(turns)) == theirs
    assert theirs[-1] == 2
    prompts = [
        tokenizer.apply_chat_template([turns[0].turn()], tokenize=False, add_generation_prompt=True)
        for tokenizer in (plain, closed)
    ]
    assert prompts[0] == prompts[1]
    assert LabelTemplate(plain).tokens(Completion("a", "b")) == [*plain("ab")["input_ids"], 2]


def test_the_pad_token_never_ends_a_text():
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert pad_token(tokenizer) == 0
    closed = classifier_tokenizer(tokenizer, 0)
    assert (closed.pad_token_id, closed.padding_side) == (0, "right")
    assert tokenizer.pad_token_id == 2
    assert closed_template(closed_template("a\n")) == closed_template("a\n")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=6),
    st.integers(2, 8),
    st.sampled_from(["end", "start", "drop"]),
)
def test_cutting_keeps_the_ends_and_the_mark(shapes, length, truncate):
    opening, closing = [1], [2]
    rows = [[1, *range(10, 10 + n), 2] if framed else list(range(10, 10 + n)) for n, framed in shapes]
    examples = [Example([*row, 0], [0.0] * len(row) + [float(n + 1)]) for n, row in enumerate(rows)]
    store = Examples.of(examples, range(len(rows)), [False] * len(rows))
    made, over = cut(store, length, truncate, opening, closing)
    assert over.tolist() == [len(row) > length for row in rows]
    kept = [n for n, row in enumerate(rows) if truncate != "drop" or len(row) <= length]
    assert made.rows.tolist() == kept
    for example, number in zip(made[:], kept, strict=True):
        row = rows[number]
        ids = np.asarray(example.input_ids).tolist()
        assert ids[-1] == 0
        assert example.weights[-1] == number + 1
        assert not any(example.weights[:-1])
        if len(row) <= length:
            assert ids[:-1] == row
            continue
        assert len(ids) == length + 1
        inner = row[1:-1] if row[0] == 1 else row
        if row[0] == 1:
            assert (ids[0], ids[-2]) == (1, 2) or length < 3
        body = ids[1:-2] if row[0] == 1 and length > 2 else ids[:-1]
        if length > 2:
            assert body == (inner[: len(body)] if truncate == "end" else inner[-len(body) :])


def test_shortened_without_room_for_the_ends():
    assert shortened([1, 5, 6, 2], 2, "end", [1], [2]) == [1, 5]
    assert shortened([1, 5, 6, 2], 2, "start", [1], [2]) == [6, 2]
