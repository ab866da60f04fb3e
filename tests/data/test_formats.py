import pytest

from ftlit.data.formats import (
    BUILT_IN,
    Alpaca,
    Conversation,
    Message,
    Messages,
    PromptCompletion,
    RawText,
    RowError,
    ShareGPT,
    detect,
)
from ftlit.data.formats.base import show
from ftlit.errors import DataError

GOLDEN_MESSAGES = [
    (
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
        [("user", "hi"), ("assistant", "yo")],
    ),
    (
        [
            {"role": "system", "content": ""},
            {"role": "user", "content": " hi\n"},
            {"role": "assistant", "content": "\nyo "},
            {"role": "tool", "content": "{}"},
            {"role": "assistant", "content": "é", "name": None},
        ],
        [("system", ""), ("user", " hi\n"), ("assistant", "\nyo "), ("tool", "{}"), ("assistant", "é")],
    ),
    ([{"role": "assistant", "content": "hello"}], [("assistant", "hello")]),
]


@pytest.mark.parametrize(("turns", "expected"), GOLDEN_MESSAGES)
def test_messages_keep_roles_order_and_text(turns, expected):
    conversation = Messages()({"messages": turns})
    assert conversation == Conversation(tuple(Message(*turn) for turn in expected))
    assert all(isinstance(message, Message) for message in conversation.messages)


def test_messages_read_a_tuple_and_another_column():
    row = {"chat": ({"role": "user", "content": "hi"},), "messages": None}
    assert Messages(column="chat")(row).messages == (Message("user", "hi"),)


GOLDEN_ALPACA = [
    ({"instruction": "i", "output": "o"}, [("user", "i"), ("assistant", "o")]),
    ({"instruction": "i", "input": "x", "output": "o"}, [("user", "i\nx"), ("assistant", "o")]),
    (
        {"instruction": "i", "input": "", "output": "o", "system": "", "history": []},
        [("user", "i"), ("assistant", "o")],
    ),
    (
        {"instruction": "i", "input": None, "output": "o", "system": None, "history": None},
        [("user", "i"), ("assistant", "o")],
    ),
    (
        {"instruction": "i", "output": "o", "system": "s"},
        [("system", "s"), ("user", "i"), ("assistant", "o")],
    ),
    (
        {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q1", "a1"], ("q2", "a2")]},
        [
            ("system", "s"),
            ("user", "q1"),
            ("assistant", "a1"),
            ("user", "q2"),
            ("assistant", "a2"),
            ("user", "i\nx"),
            ("assistant", "o"),
        ],
    ),
    ({"instruction": " i ", "output": "o\n", "id": 7}, [("user", " i "), ("assistant", "o\n")]),
]


@pytest.mark.parametrize(("row", "expected"), GOLDEN_ALPACA)
def test_alpaca_rows_become_these_messages(row, expected):
    assert Alpaca()(row) == Conversation(tuple(Message(*turn) for turn in expected))


TURN = {"role": "user", "content": "hi"}
LIST = "a list of at least one message"
ROLE = "one of system, user, assistant, tool (data.format's roles can name others)"
BAD_MESSAGES = [
    ({}, "messages", LIST, "null or nothing"),
    ({"messages": None}, "messages", LIST, "null or nothing"),
    ({"messages": []}, "messages", LIST, "[]"),
    ({"messages": "hi"}, "messages", LIST, "'hi'"),
    ({"messages": {"role": "user"}}, "messages", LIST, "{'role': 'user'}"),
    ({"messages": 3}, "messages", LIST, "3"),
    ({"messages": [TURN, "hi"]}, "messages[1]", "an object with role and content", "'hi'"),
    ({"messages": [None]}, "messages[0]", "an object with role and content", "null or nothing"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role", ROLE, "null or nothing"),
    ({"messages": [TURN, {"role": "martian", "content": "hi"}]}, "messages[1].role", ROLE, "'martian'"),
    ({"messages": [{"role": "us er", "content": "hi"}]}, "messages[0].role", ROLE, "'us er'"),
    ({"messages": [{"role": ["user"], "content": "hi"}]}, "messages[0].role", ROLE, "['user']"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "non-empty text", "null or nothing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "non-empty text", "null or nothing"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content", "non-empty text", "''"),
    ({"messages": [TURN, {"role": "assistant", "content": " \n"}]}, "messages[1].content", "non-empty text", "' \\n'"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "non-empty text", "5"),
    ({"messages": [{"role": "system", "content": None}]}, "messages[0].content", "non-empty text", "null or nothing"),
]


@pytest.mark.parametrize(("row", "column", "wanted", "got"), BAD_MESSAGES)
def test_bad_messages_name_column_and_value(row, column, wanted, got):
    with pytest.raises(RowError) as error:
        Messages()(row)
    assert str(error.value) == f"column '{column}' must hold {wanted}, got {got}."
    assert (error.value.column, error.value.wanted) == (column, wanted)
    assert isinstance(error.value, DataError)


OK = {"instruction": "i", "output": "o"}
BAD_ALPACA = [
    ({"output": "o"}, "instruction", "non-empty text", "null or nothing"),
    ({"instruction": None, "output": "o"}, "instruction", "non-empty text", "null or nothing"),
    ({"instruction": " ", "output": "o"}, "instruction", "non-empty text", "' '"),
    ({"instruction": ["i"], "output": "o"}, "instruction", "non-empty text", "['i']"),
    ({"instruction": "i"}, "output", "non-empty text", "null or nothing"),
    ({"instruction": "i", "output": ""}, "output", "non-empty text", "''"),
    ({"instruction": "i", "output": 4}, "output", "non-empty text", "4"),
    ({**OK, "input": 4}, "input", "text or null", "4"),
    ({**OK, "system": ["s"]}, "system", "text or null", "['s']"),
    ({**OK, "history": "q"}, "history", "a list of pairs of texts", "'q'"),
    ({**OK, "history": {"q": "a"}}, "history", "a list of pairs of texts", "{'q': 'a'}"),
    ({**OK, "history": ["qa"]}, "history[0]", "a pair of texts", "'qa'"),
    ({**OK, "history": [["q", "a"], ["q"]]}, "history[1]", "a pair of texts", "['q']"),
    ({**OK, "history": [["q", "a", "x"]]}, "history[0]", "a pair of texts", "['q', 'a', 'x']"),
    ({**OK, "history": [["q", None]]}, "history[0]", "a pair of texts", "['q', None]"),
    ({**OK, "history": [["q", ""]]}, "history[0]", "a pair of texts", "['q', '']"),
]


@pytest.mark.parametrize(("row", "column", "wanted", "got"), BAD_ALPACA)
def test_bad_alpaca_rows_name_column_and_value(row, column, wanted, got):
    with pytest.raises(RowError) as error:
        Alpaca()(row)
    assert str(error.value) == f"column '{column}' must hold {wanted}, got {got}."


def test_history_of_blank_text_is_refused_as_every_other_turn_is():
    with pytest.raises(RowError, match=r"column 'history\[0\]'"):
        Alpaca()({**OK, "history": [["q", " \n"]]})


def test_shown_values_are_cut_to_60_characters():
    assert show("x" * 58) == "'" + "x" * 58 + "'"
    assert show("x" * 59) == "'" + "x" * 56 + "..."
    assert len(show("x" * 1000)) == 60


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["messages"], Messages),
        (["id", "messages", "source"], Messages),
        (["instruction", "output"], Alpaca),
        (["history", "input", "instruction", "output", "system"], Alpaca),
        (["instruction", "messages", "output"], Messages),
        (["conversations", "id"], ShareGPT),
        (["completion", "prompt"], PromptCompletion),
        (["text", "url"], RawText),
    ],
)
def test_format_follows_from_columns(columns, kind):
    assert type(detect(columns, "rows.jsonl")) is kind


KNOWN = (
    "(Messages needs messages; ShareGPT needs conversations; Alpaca needs instruction, output; "
    "PromptCompletion needs prompt, completion; FunctionCalls needs query, tools, answers; Segments needs segments; "
    "RawText needs text)"
)


@pytest.mark.parametrize(
    ("columns", "listed", "advice"),
    [
        (["output", "instructions"], "instructions, output", ": {instruction: instructions, output: output}"),
        (["question", "answer"], "answer, question", ": {instruction: question, output: answer}"),
        (
            ["Frage", "id", "Antwort"],
            "Antwort, Frage, id",
            ": {instruction: Frage, output: Antwort} (id would not be read)",
        ),
        (["dialogue"], "dialogue", ": {messages: dialogue}"),
        (["content", "url", "n"], "content, n, url", ": {text: content} (n, url would not be read)"),
        (["x", "y"], "x, y", ": {instruction: x, output: y}"),
        (["x", "y", "z"], "x, y, z", ""),
        ([], "(none)", ""),
    ],
)
def test_columns_that_fit_nothing_name_every_format_and_what_to_set(columns, listed, advice):
    with pytest.raises(DataError) as error:
        detect(columns, "rows.jsonl")
    suggested = f"Say which is which, such as data.columns{advice}" if advice else "Say which is which: data.columns"
    assert str(error.value) == (
        f"rows.jsonl: columns {listed} fit no known row format {KNOWN}. {suggested}, or give data.format a class of "
        "your own."
    )


def test_every_built_in_format_is_detectable():
    assert all(kind.columns for kind in BUILT_IN)
    assert {type(detect(kind.columns, "x")) for kind in BUILT_IN} == set(BUILT_IN)
