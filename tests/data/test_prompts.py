"""Prompts: any format, the last answer left out, columns kept; an endless order that leaves nothing out."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlit.data.prompts import PromptData, PromptLoader, PromptOrder
from ftlit.errors import ConfigError, DataError
from ftlit.testing import tiny_tokenizer


@given(st.integers(1, 20), st.integers(1, 30), st.integers(1, 12), st.booleans())
def test_every_prompt_comes_once_an_epoch_whatever_the_rollouts(prompts, size, rollouts, shuffle):
    order = PromptOrder(prompts, size, shuffle, seed=3)
    stream = [pair for number in range(rollouts) for pair in order.rollout(number * size)]
    assert [place for place, _ in stream] == list(range(rollouts * size))
    assert [row for _, row in stream] == [order.order(p // prompts)[p % prompts] for p in range(rollouts * size)]
    assert all(sorted(order.order(epoch)) == list(range(prompts)) for epoch in range(3))
    covered = Counter(row for number in range(len(order)) for _, row in order.rollout(number * size))
    assert set(covered) == set(range(prompts))
    if not shuffle:
        assert order.order(5) == list(range(prompts))


@given(st.integers(0, 30), st.integers(1, 7), st.integers(1, 4))
def test_ranks_share_the_rows_in_as_many_batches(rows, size, world):
    loaders = [PromptLoader(rows, size, rank, world) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    assert len({len(one) for one in batches}) == len({len(loader) for loader in loaders}) == 1
    assert all(len(one) == len(loader) for one, loader in zip(batches, loaders, strict=True))
    assert sorted(row for rank in batches for batch in rank for row in batch) == list(range(rows))
    assert all(len(batch) <= size for rank in batches for batch in rank)


def data(tmp_path, rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = PromptData(train=str(path), **settings)
    made.use_tokenizer(tiny_tokenizer())
    made.setup("fit")
    return made


FORMATS = {
    "messages": ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "n": 7}, "A"),
    "no answer": ({"messages": [{"role": "user", "content": "Q"}], "n": 7}, None),
    "alpaca": ({"instruction": "Q", "input": "", "output": "A", "n": 7}, "A"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "n": 7}, "A"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_prompt(tmp_path, kind):
    row, reference = FORMATS[kind]
    (found,) = data(tmp_path, [row]).rows["train"]
    assert found.turns == [{"role": "user", "content": "Q"}]
    assert tiny_tokenizer().decode(found.input_ids) == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert found.reference == reference
    assert found.columns["n"] == 7
    assert found.where.endswith("row 1")


def test_plain_completions_are_continued(tmp_path):
    (found,) = data(tmp_path, [{"prompt": "2 + 2 =", "completion": " 4"}]).rows["train"]
    assert tiny_tokenizer().decode(found.input_ids).endswith("2 + 2 =")
    assert found.reference == " 4"


def test_earlier_answers_stay_and_placeholders_are_filled(tmp_path):
    turns = [("user", "Hi"), ("assistant", "I am {{name}}"), ("user", "Who?"), ("assistant", "{{name}}")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (found,) = data(tmp_path, [row], fill={"name": "Nova"}, system="Be kind.").rows["train"]
    assert [turn["content"] for turn in found.turns] == ["Be kind.", "Hi", "I am Nova", "Who?"]
    assert found.reference == "Nova"


def many(count):
    return [{"messages": [{"role": "user", "content": "x" * (2 * number + 1)}]} for number in range(count)]


def test_a_share_is_held_out_and_the_long_are_counted(tmp_path):
    made = data(tmp_path, many(20), validation=0.25, max_length=34)
    rows = {name: [row.where for row in rows] for name, rows in made.rows.items()}
    assert set(rows) == {"train", "validation:main"}
    assert not set(rows["train"]) & set(rows["validation:main"])
    assert all(len(row.input_ids) <= 34 for kept in made.rows.values() for row in kept)
    said = " ".join(made.describe())
    assert made.describe()[0].startswith("train: ")
    left = 20 - sum(map(len, rows.values()))
    assert left > 0
    assert "longer than 34 tokens are left out" in said
    assert "no answers of their own" in said
    again = data(tmp_path, many(20), validation=0.25, max_length=34)
    assert [row.where for row in again.rows["validation:main"]] == rows["validation:main"]
    assert again.fingerprint() == made.fingerprint()
    assert data(tmp_path, many(21)).fingerprint() != made.fingerprint()


def test_bad_rows_are_errors_or_counted(tmp_path, capsys):
    rows = [*many(3), {"messages": "nothing"}]
    with pytest.raises(DataError, match="row 4"):
        data(tmp_path, rows)
    made = data(tmp_path, rows, on_bad_row="skip")
    assert len(made.rows["train"]) == 3
    assert "1 of 4 rows cannot be read and are skipped" in capsys.readouterr().out


def test_nothing_left_is_said(tmp_path):
    with pytest.raises(DataError, match=r"none of 3 rows is a prompt within data\.max_length=5 tokens"):
        data(tmp_path, many(3), max_length=5)
    with pytest.raises(ConfigError, match=r"data\.train is missing"):
        PromptData().setup("fit")
