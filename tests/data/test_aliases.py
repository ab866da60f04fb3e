"""Columns that have one meaning under other names than the formats' are read, the others are named."""

import json

import pytest

from ftlit.data.datamodules import SFTData
from ftlit.data.formats import (
    Alpaca,
    Conversation,
    FunctionCalls,
    Message,
    Messages,
    PromptCompletion,
    RawText,
    detect,
    detect_preference,
    known_columns,
    known_pairs,
    suggest,
)
from ftlit.data.preferences import PreferenceData
from ftlit.data.prompts import PromptData
from ftlit.data.sources import Source
from ftlit.errors import DataError
from ftlit.testing import RowFormatSuite, tiny_tokenizer

TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
CALLS = [{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}]
CALLED = [{"type": "function", "function": call} for call in CALLS]


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(question, answer, system=None):
    turns = [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple([Message("system", system), *turns] if system else turns))


# ---- which columns are which ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "renamed", "record"),
    [
        ({"instruction": "q", "context": "c", "response": "a", "category": "x"},
         "{output: response, input: context}", asked("q\nc", "a")),
        ({"id": 1, "system_prompt": "s", "question": "q", "response": "a"},
         "{instruction: question, output: response, system: system_prompt}", asked("q", "a", "s")),
        ({"Question": "q", "Complex_CoT": "c", "Response": "a"},
         "{instruction: Question, output: Response}", asked("q", "a")),
        ({"query": "q", "original_question": "o", "response": "a", "type": "t"},
         "{instruction: query, output: response}", asked("q", "a")),
        ({"problem": "q", "solution": "long", "answer": "4"},
         "{instruction: problem, output: solution}", asked("q", "long")),
        ({"problem": "q", "generated_solution": "long", "expected_answer": "4"},
         "{instruction: problem, output: generated_solution}", asked("q", "long")),
        ({"kind": "k", "input": "q", "target": "a"}, "{instruction: input, output: target}", asked("q", "a")),
        ({"inputs": "q", "targets": "a"}, "{instruction: inputs, output: targets}", asked("q", "a")),
        ({"inputs_pretokenized": "q", "targets_pretokenized": "a", "inputs": [1], "targets": [2]},
         "{instruction: inputs_pretokenized, output: targets_pretokenized}", asked("q", "a")),
        ({"prompt": "q", "response": "a"}, "{instruction: prompt, output: response}", asked("q", "a")),
        ({"article": "q", "highlights": "a", "id": "1"}, "{instruction: article, output: highlights}", asked("q", "a")),
        ({"instruction": "q", "output": "a", "system_prompt": "s"}, "{system: system_prompt}", asked("q", "a", "s")),
        ({"instruction": "q", "output": "a", "context": ""}, "{input: context}", asked("q", "a")),
        ({"conversation": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "turn": 1},
         "{messages: conversation}", asked("q", "a")),
        ({"context": "c", "question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}, "title": "t"},
         "{instruction: question, output: answers, input: context}", asked("q\nc", "a")),
        ({"question": "q", "answer": ["a", "b"]}, "{instruction: question, output: answer}", asked("q", "a")),
        ({"question": "q", "answers": ["a"], "url": "u"}, "{instruction: question, output: answers}", asked("q", "a")),
        ({"conversation": [{"input": "q", "output": "a"}]}, "{messages: conversation}", asked("q", "a")),
        ({"dialogue": [{"question": "q", "answer": "a"}], "story": "s"}, "{messages: dialogue}", asked("q", "a")),
        ({"turns": [{"prompt": "q", "response": "a"}]}, "{messages: turns}", asked("q", "a")),
        ({"system": "SYSTEM: s", "chat": "USER: q\n\n\nASSISTANT: a <|endoftext|>\n\n\n"},
         "{messages: chat}", asked("q", "a", "s")),
        ({"chat": "\n\nHuman: q\n\nAssistant: a"}, "{messages: chat}", asked("q", "a")),
        ({"conversation": "### User: q\n### Bot: a"}, "{messages: conversation}", asked("q", "a")),
        ({"dialog": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
         "{messages: dialog}", asked("q", "a")),
    ],
)  # fmt: skip
def test_one_meaning(tmp_path, row, renamed, record):
    source = Source(write(tmp_path, row))
    assert source.record(0) == record
    assert source.notes == [f"{tmp_path}/rows.jsonl: read with data.columns: {renamed}"]
    read = set(renamed.strip("{}").replace(":", ",").replace(",", " ").split())
    assert set(source.unread()) == set(row) - read - {"instruction", "output", "system"}
    fitted = Source(write(tmp_path, row), columns=dict(part.split(": ") for part in renamed.strip("{}").split(", ")))
    assert fitted.record(0) == record  # what is said can be typed
    assert fitted.notes == []


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [], "question": "q", "answer": "a"}, Messages),
        ({"text": "t", "question": "q", "answer": "a"}, RawText),
        ({"prompt": "p", "completion": "c", "system_prompt": "s"}, PromptCompletion),
        ({"instruction": "i", "input": "x", "output": "o", "text": "t", "question": "q"}, Alpaca),
    ],
)
def test_a_format_of_its_own_goes_first(row, kind):
    assert known_columns(row, row) == {}
    assert type(detect(row, "f")) is kind


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "problem": "p", "answer": "a"},  # which is asked?
        {"question": "q", "answer": {"start": 3}},  # no text
        {"question": ["q"], "answer": "a"},
        {"question": "q", "context": "c"},  # no answer
        {"a": "q", "b": "a"},
    ],
)
def test_no_one_meaning(tmp_path, row):
    assert known_columns(row, row) == {}
    with pytest.raises(DataError, match="fit no known row format"):
        Source(write(tmp_path, row))


@pytest.mark.parametrize(
    ("columns", "suggested", "lost"),
    [
        (["Instruktion", "context", "antwort", "category"], None, None),
        (
            ["frage", "context", "antwort", "category"],
            "{instruction: frage, output: antwort, input: context}",
            "category",
        ),
        (["frage", "system_prompt", "antwort"], "{instruction: frage, output: antwort, system: system_prompt}", ""),
        (["story", "title", "author"], "{text: story}", "author, title"),
    ],
)
def test_advice_loses_no_column(columns, suggested, lost):
    with pytest.raises(DataError) as error:
        detect(columns, "f")
    if suggested is not None:
        left = f" ({lost} would not be read)" if lost else ""
        assert f"such as data.columns: {suggested}{left}, or give" in str(error.value)
    assert set(suggest(columns).values()) <= set(columns)


def test_a_question_without_an_answer_is_said(tmp_path):
    row = {"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}}
    path = write(tmp_path, row)
    with pytest.raises(DataError, match=r"row 1: column 'answers' must hold an answer \(the question has none: leave"):
        Source(path).record(0)
    assert Source(path, answers=False).record(0).messages == (Message("user", "q\nc"),)


def test_calls_of_a_text_with_speakers(tmp_path):
    said = """USER: q\n\n\nASSISTANT: So: <functioncall> {"name": "add", "arguments": '{"a": "it's"}'} <|endoftext|>
\n\nFUNCTION RESPONSE: 4\n\n\nASSISTANT: 4. <|endoftext|>"""
    _, call, result, answer = Source(write(tmp_path, {"chat": said})).record(0).messages
    wanted = [{"type": "function", "function": {"name": "add", "arguments": {"a": "it's"}}}]
    assert (call.content, call.more["tool_calls"]) == ("So:", wanted)
    assert (result, answer) == (Message("tool", "4"), Message("assistant", "4."))


def test_turns_of_a_tree_are_no_documents(tmp_path):
    row = {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "Yes."}
    with pytest.raises(DataError, match="hold one turn a row, of trees of turns; write each conversation as one row"):
        Source(write(tmp_path, row))


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        (["chosen_messages", "rejected_messages"], {"chosen": "chosen_messages", "rejected": "rejected_messages"}),
        (["p", "response_chosen", "response_rejected"], {"chosen": "response_chosen", "rejected": "response_rejected"}),
        (
            ["chosen_answer", "rejected_answer", "chosen_model"],
            {"chosen": "chosen_answer", "rejected": "rejected_answer"},
        ),
        (["chosen", "rejected", "chosen_messages", "rejected_messages"], {}),
        (["chosen_text", "rejected_text", "chosen_messages", "rejected_messages"], {}),
        (["chosen_model", "rejected_model"], {}),
        (["chosen_messages", "rejected_answer"], {}),
    ],
)
def test_pairs_that_say_by_their_names_what_they_are(columns, wanted):
    assert known_pairs(columns) == wanted


def test_pairs_of_parts_are_read(tmp_path):
    def told(answer):
        return [{"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": answer}], "loss_weight": 1.0}]  # fmt: skip

    path = write(tmp_path, {"chosen_messages": told("a"), "rejected_messages": told("b")})
    source = Source(path, choose=detect_preference, known=PreferenceData._known)
    assert [answer.messages[-1].content for answer in source.record(0).answers] == ["a", "b"]
    assert source.unread() == []


def test_some_columns_are_given_and_the_rest_is_known(tmp_path):
    row = {"question": "q", "solution": "4", "attempt": "a", "system_prompt": "s"}
    source = Source(write(tmp_path, row), columns={"output": "attempt", "system": None})
    assert source.record(0) == asked("q", "a")
    assert source.notes == [f"{tmp_path}/rows.jsonl: read with data.columns: {{instruction: question}}"]


# ---- what a run says ------------------------------------------------------------------------------------------------


def test_a_run_names_what_it_does_not_read(tmp_path, capsys):
    data = SFTData(train=write(tmp_path, {"instruction": "q", "output": "a", "category": "x", "id": 1}), cache=False)
    data.use_tokenizer(tiny_tokenizer())
    data.setup("fit")
    assert data.describe()[-1] == "rows.jsonl: columns not read: category, id"
    assert "columns not read: category, id" in "\n".join(data.report())


def test_rewards_get_columns_under_both_names(tmp_path):
    data = PromptData(train=write(tmp_path, {"question": "2+2?", "answer": "4", "solution": "2+2 is 4.", "level": 1}))
    data.use_tokenizer(tiny_tokenizer())
    data.load_train()
    (row,) = data.rows["train"]
    assert row.reference == "4"
    wanted = {
        "question": "2+2?",
        "instruction": "2+2?",
        "answer": "4",
        "output": "4",
        "solution": "2+2 is 4.",
        "level": 1,
    }
    assert row.columns == wanted


# ---- calls ----------------------------------------------------------------------------------------------------------


class TestFunctionCalls(RowFormatSuite):
    wrapped = {"type": "function", "function": TOOL}  # noqa: RUF012
    turns = (Message("user", "1 and 2?"), Message("assistant", "", more={"tool_calls": CALLED}))
    golden = (
        (
            {"query": "1 and 2?", "answers": json.dumps(CALLS), "tools": json.dumps([TOOL]), "id": 1},
            Conversation(turns, (wrapped,)),
        ),
        (
            {"query": "1 and 2?", "answers": CALLS, "tools": [TOOL], "system": "Add.", "weight": 2},
            Conversation((Message("system", "Add."), *turns), (wrapped,), 2.0),
        ),
    )
    bad = (
        ({"query": "q", "answers": "add(1)", "tools": [TOOL]}, "answers"),
        ({"query": "q", "answers": "[]", "tools": [TOOL]}, "answers"),
        ({"query": "q", "answers": json.dumps(CALLS), "tools": "[]"}, "tools"),
        ({"query": " ", "answers": json.dumps(CALLS), "tools": [TOOL]}, "query"),
    )

    def make(self):
        return FunctionCalls()


@pytest.mark.parametrize("question", ["query", "question", "instruction"])
@pytest.mark.parametrize("calls", ["answers", "tool_calls", "function_calls"])
def test_calls_are_answers(tmp_path, question, calls):
    source = Source(write(tmp_path, {question: "q", calls: json.dumps(CALLS), "tools": json.dumps([TOOL])}))
    assert type(source.row_format) is FunctionCalls
    assert source.record(0).messages[1].more == {"tool_calls": CALLED}


@pytest.mark.parametrize("beside", ["scores", "ranks"])
def test_answers_that_are_ranked_are_no_references(tmp_path, beside):
    with pytest.raises(DataError, match="fit no known row format"):
        Source(write(tmp_path, {"prompt": "2+2=", "answers": ["5", "4"], beside: [1, 9]})).record(0)
