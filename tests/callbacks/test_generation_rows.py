"""What generation is asked is, token for token, what training puts before an answer."""

import json

import numpy as np
import pytest

from ftlit.callbacks.generation_rows import eval_rows
from ftlit.data.datamodules import SFTData
from ftlit.data.preferences import PreferenceData
from ftlit.errors import ConfigError, DataError
from ftlit.testing import tiny_tokenizer
from ftlit.testing.tiny import TOOLS_TEMPLATE

# Refuses two turns of one role in a row, as many templates do.
STRICT = (
    "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}


def turns(*texts, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture
def data(tmp_path):
    def make(rows, template=None, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        made = SFTData(train=str(path), cache=False, **settings)
        made.use_tokenizer(tiny_tokenizer() if template is None else tiny_tokenizer(template))
        return made

    return make


ROWS = {
    "messages": {"messages": turns("Hi?", "Yes.")},
    "several turns": {"messages": turns("Hi?", "Yes.", "Why?", "Because.")},
    "tools": {"messages": turns("2 + 2?", "4"), "tools": [TOOL]},
    "prompt and completion": {"prompt": "The sea is", "completion": " blue."},
    "alpaca": {"instruction": "Add.", "input": "1 1", "output": "2"},
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_prompt_is_that_of_training(data, kind):
    made = data([ROWS[kind]] * 2, TOOLS_TEMPLATE, validation=0.5)
    made.load_train()
    (example,) = made.sets["validation:main"]
    ((row,), available, documents) = eval_rows(made, None, False, None, 0)
    (places,) = np.nonzero(example.weights)
    last = places[np.nonzero(np.diff(places, prepend=-9) > 1)[0][-1]]  # where the last trained stretch begins
    assert row.prompt == example.input_ids[:last].tolist()
    assert made.template.tokenizer.decode(example.input_ids[last:-1]).rstrip() in (
        row.reference,
        f"{row.reference}<|im_end|>",
    )
    assert (available, documents) == (1, 0)


def test_held_out_rows_are_those_of_the_validation_loss(data, capsys):
    """Also where some rows are skipped because the template refuses them: none of the others may be trained on."""
    rows = [{"messages": turns(f"Question {n}?", f"Answer {n}.")} for n in range(30)]
    for number in (3, 4, 11, 20):
        rows[number]["messages"].insert(0, {"role": "user", "content": "twice"})
    made = data(rows, STRICT, validation=0.3, on_bad_row="skip")
    made.load_train()
    found = eval_rows(made, None, False, None, 0)
    shown = [made.template.tokenizer.decode(e.input_ids) for e in made.sets["validation:main"]]
    assert [
        f"<|im_start|>user\n{row.messages[0].content}<" in text for row, text in zip(found.chosen, shown, strict=True)
    ] == [True] * 8
    assert capsys.readouterr().out.count("4 of 30 rows cannot be read and are skipped") == 1


def test_rows_that_cannot_be_asked(data, capsys):
    bad = {"messages": [*turns("a"), *turns("b", "c")]}
    rows = [{"messages": turns("Hi?", "Yes.")}, bad, {"messages": [{"role": "user"}]}]
    made = data(rows, STRICT, on_bad_row="skip")
    found = eval_rows(made, made.files[0], False, None, 0)
    assert [row.number for row in found.chosen] == [1]
    said = capsys.readouterr().out
    assert "row 3: column 'messages[0].content'" in said
    assert "row 2: the chat template refuses" in said
    made.on_bad_row = "error"
    with pytest.raises(DataError, match="row 3"):
        eval_rows(made, made.files[0], False, None, 0)


def test_raw_text_asks_nothing(data):
    made = data([{"text": "The sea is blue."}])
    with pytest.raises(ConfigError, match="has no questions, only raw text"):
        eval_rows(made, made.files[0], False, None, 0)


def test_a_call_is_no_text_to_compare_with(data):
    call = {"role": "assistant", "content": "", "tool_calls": [TOOL | {"function": {"name": "add", "arguments": {}}}]}
    made = data([{"messages": [*turns("2 + 2?"), call], "tools": [TOOL]}], TOOLS_TEMPLATE)
    (row,) = eval_rows(made, made.files[0], False, None, 0).chosen
    assert row.reference is None


COMPARED = {
    "texts": ({"prompt": "The sea is", "chosen": " blue.", "rejected": " red."}, " blue."),
    "turns": (
        {
            "prompt": turns("Hi?"),
            "chosen": turns("Yes.", first="assistant"),
            "rejected": turns("No.", first="assistant"),
        },
        "Yes.",
    ),
    "several turns": (
        {"chosen": turns("Hi?", "Yes.", "Why?", "So."), "rejected": turns("Hi?", "No.", "Why?", "So.")},
        "Yes.",
    ),
    "ranking": ({"prompt": "The sea is", "answers": [" red.", " blue."], "scores": [1, 2]}, " blue."),
    "a good one": ({"prompt": turns("Hi?"), "completion": turns("Yes.", first="assistant"), "label": True}, "Yes."),
    "a bad one": ({"prompt": turns("Hi?"), "completion": turns("No.", first="assistant"), "label": False}, None),
}


@pytest.mark.parametrize("kind", COMPARED)
def test_the_best_of_compared_answers_is_the_reference(tmp_path, kind):
    given, reference = COMPARED[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(given) + "\n" for _ in range(4)))
    made = PreferenceData(train=str(path), validation=0.5, cache=False, max_tokens=None)
    made.use_tokenizer(tiny_tokenizer())
    made.load_train()
    ((row, *_), _, _) = eval_rows(made, None, False, None, 0)
    assert row.reference == reference
    prompt = made.template.tokenizer.decode(row.prompt)
    assert ("The sea is" if isinstance(given.get("prompt"), str) else "Hi?") in prompt
    for answer in ("Yes", "No", "blue", "red", "Why"):
        assert answer not in prompt
