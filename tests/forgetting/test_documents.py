import json

import numpy as np
import pytest

from ftlit.data.datamodules import SFTData
from ftlit.errors import DataError
from ftlit.forgetting.documents import Documents, read_documents
from ftlit.testing import tiny_examples, tiny_tokenizer


@pytest.fixture
def data():
    data = SFTData(cache=False)
    data.use_tokenizer(tiny_tokenizer())
    return data


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def read(data, rows, max_tokens=10_000, max_length=200, seed=0):
    return read_documents(data, rows, max_tokens=max_tokens, max_length=max_length, seed=seed)


def texts(data, documents):
    ids = [[t for t, w in zip(e.input_ids, e.weights, strict=True) if w] for e in documents.examples]
    return [data.template.tokenizer.decode(part) for part in ids]


def test_of_a_conversation_the_answers_are_scored(data, tmp_path):
    documents, words = read(data, written(tmp_path / "rows.jsonl", [chat("Why?", "So."), chat("When?", "Now!")]))
    assert texts(data, documents) == ["So.<|im_end|>", "Now!<|im_end|>"]
    assert words == "2 of 2 documents, 9 scored tokens"
    assert documents.token_owners.tolist() == [0] * 4 + [1] * 5


def test_of_text_every_token_is_scored_and_its_windows_are_one_document(data, tmp_path):
    rows = written(tmp_path / "rows.jsonl", [{"text": "abcdefghij" * (1 + i % 2)} for i in range(12)])
    documents, words = read(data, rows, max_length=8)
    assert words.startswith("12 of 12 documents, ")
    assert len(documents.examples) > 12
    owners = np.asarray(documents.owners)
    pieces = list(zip(owners, texts(data, documents), strict=True))
    whole = {"".join(text for owner, text in pieces if owner == number) for number in range(12)}
    begin = int(not data.template.tokenizer("a")["input_ids"][1:])  # without a begin token, nothing predicts the first
    assert whole == {("abcdefghij" * times)[begin:] + "<|im_end|>" for times in (1, 2)}
    assert len(documents.token_owners) == sum(example.num_targets for example in documents.examples)


def test_a_few_long_texts_are_taken_by_their_windows(data, tmp_path):
    (tmp_path / "book.txt").write_text("All work and no play. " * 40)
    documents, words = read(data, str(tmp_path / "book.txt"), max_length=50)
    assert len(np.unique(documents.owners)) == len(documents.examples) > 10
    assert "their windows of 50 tokens are the documents" in words


def test_more_than_fits_is_thinned_by_whole_documents_the_same_each_time(data, tmp_path):
    rows = written(tmp_path / "rows.jsonl", [chat(f"Q{i}?", "x" * (1 + i % 5)) for i in range(60)])
    documents, words = read(data, rows, max_tokens=500)
    tokens = sum(len(example.input_ids) for example in documents.examples)
    assert 400 < tokens <= 500
    assert f"{len(documents.examples)} of 60 documents" in words
    assert read(data, rows, max_tokens=500)[0].fingerprint() == documents.fingerprint()
    assert read(data, rows, max_tokens=500, seed=1)[0].fingerprint() != documents.fingerprint()
    assert len(read(data, rows, max_tokens=2)[0].examples) == 1


def test_the_choice_does_not_prefer_short_documents(data, tmp_path):
    rows = written(tmp_path / "rows.jsonl", [chat("Q?", "x" * (100 if i % 2 else 1)) for i in range(40)])
    long = 0
    for seed in range(30):
        documents, _ = read(data, rows, max_tokens=1500, seed=seed)
        long += sum(len(e.input_ids) > 100 for e in documents.examples) / len(documents.examples) / 30
    assert 0.4 < long < 0.6


def test_what_is_left_out_is_said(data, tmp_path):
    rows = [chat("Why?", "y" * 300), chat("Why?", "z"), {"messages": chat("a", "b")["messages"], "weight": 0}]
    _, words = read(data, written(tmp_path / "rows.jsonl", rows), max_length=100)
    assert "1 rows lose their end" in words
    assert "1 rows have nothing to score" in words


def test_nothing_to_score_is_refused(data, tmp_path):
    rows = written(tmp_path / "rows.jsonl", [chat("Why?" * 100, "y")])
    with pytest.raises(DataError, match="none of 1 rows has a token to score within 20 tokens"):
        read(data, rows, max_length=20)


def test_the_system_turn_and_the_placeholders_of_the_run_are_used_but_not_its_columns(tmp_path):
    data = SFTData(cache=False, system="Be kind.", fill={"name": "Nova"}, columns={"instruction": "question"})
    data.use_tokenizer(tiny_tokenizer())
    documents, _ = read(data, written(tmp_path / "rows.jsonl", [chat("Who?", "I am {{name}}.")]))
    shown = data.template.tokenizer.decode(documents.examples[0].input_ids)
    assert "Be kind." in shown
    assert "I am Nova." in shown


def test_fingerprint_sees_tokens_and_what_is_scored():
    one, two = tiny_examples((5, 6)), tiny_examples((5, 6))
    assert Documents(one).fingerprint() == Documents(two).fingerprint()
    two[1] = two[1]._replace(weights=[0.0, *[1.0] * 5])
    assert Documents(one).fingerprint() != Documents(two).fingerprint()
