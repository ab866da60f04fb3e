import pytest

from ftlit.data.formats import (
    Alpaca,
    Completion,
    Conversation,
    Message,
    Messages,
    PromptCompletion,
    RawText,
    RowFormat,
    Segments,
    ShareGPT,
    Text,
)
from ftlit.testing import RowFormatSuite


class TestMessages(RowFormatSuite):
    golden = (
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
            (("user", "Hi"), ("assistant", "Yo")),
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Yo"},
                    {"role": "user", "content": "And?"},
                    {"role": "assistant", "content": "Well."},
                ]
            },
            (("system", "Be kind."), ("user", "Hi"), ("assistant", "Yo"), ("user", "And?"), ("assistant", "Well.")),
        ),
    )
    bad = (({"messages": []}, "messages"), ({"messages": [{"role": "martian", "content": "x"}]}, "messages"))

    def make(self):
        return Messages()


class TestAlpaca(RowFormatSuite):
    golden = (
        ({"instruction": "Add", "input": "1 2", "output": "3"}, (("user", "Add\n1 2"), ("assistant", "3"))),
        ({"instruction": "Add", "output": "3"}, (("user", "Add"), ("assistant", "3"))),
    )
    bad = (({"instruction": "Add", "output": ""}, "output"), ({"instruction": None, "output": "3"}, "instruction"))

    def make(self):
        return Alpaca()


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


class TestMessagesWithTools(RowFormatSuite):
    golden = (
        (
            {
                "messages": [
                    {"role": "developer", "content": "Be exact."},
                    {"role": "user", "content": "1+2?"},
                    {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
                    {"role": "tool", "content": "3", "name": "add", "tool_call_id": None},
                    {"role": "assistant", "content": "Three.", "train": True},
                ],
                "tools": [TOOL],
                "weight": 2,
            },
            Conversation(
                (
                    Message("system", "Be exact."),
                    Message("user", "1+2?"),
                    Message("assistant", "", 0.0, {"tool_calls": [CALL]}),
                    Message("tool", "3", more={"name": "add"}),
                    Message("assistant", "Three."),
                ),
                (TOOL,),
                2.0,
            ),
        ),
    )
    bad = (
        ({"messages": [{"role": "user", "content": "x"}], "tools": "{"}, "tools"),
        ({"messages": [{"role": "user", "content": "x"}], "weight": -1}, "weight"),
        ({"messages": [{"role": "user", "content": "x"}], "weight": "much"}, "weight"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": "add"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a", "train": "no"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": float("nan")}]}, "messages"),
    )

    def make(self):
        return Messages()


class TestShareGPT(RowFormatSuite):
    golden = (
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
            (("user", "Hi"), ("assistant", "Yo")),
        ),
        (
            {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
            (("user", "Hi"), ("assistant", "Yo")),
        ),
        (
            {
                "system": "Be exact.",
                "tools": '[{"name": "add"}]',
                "weight": "0.5",
                "conversations": [
                    {"from": "human", "value": "1+2?"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "3"},
                    {"from": "model", "value": "Three.", "train": False},
                    {"from": "user", "value": "Sure?"},
                    {"from": "assistant", "value": "Yes."},
                ],
            },
            Conversation(
                (
                    Message("system", "Be exact."),
                    Message("user", "1+2?"),
                    Message(
                        "assistant",
                        "",
                        1.0,
                        {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
                    ),
                    Message("tool", "3"),
                    Message("assistant", "Three.", 0.0),
                    Message("user", "Sure?"),
                    Message("assistant", "Yes."),
                ),
                ({"type": "function", "function": {"name": "add"}},),
                0.5,
            ),
        ),
    )
    bad = (
        ({"conversations": []}, "conversations"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "conversations"),
        ({"conversations": [{"from": "human", "value": None}]}, "conversations"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, "conversations"),
        ({"conversations": ["hi"]}, "conversations"),
        (
            {"conversations": [{"from": "human", "value": "x"}], "chosen": {"from": "gpt", "value": "y"}},
            "conversations",
        ),
    )

    def make(self):
        return ShareGPT()


class TestShareGPTOfPreferences(RowFormatSuite):
    golden = (
        (
            {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Yo"}},
            (("user", "Hi"), ("assistant", "Yo")),
        ),
    )
    bad = (({"conversations": [{"from": "human", "value": "Hi"}]}, "chosen"),)

    def make(self):
        return ShareGPT(answer_column="chosen")


class TestPromptCompletion(RowFormatSuite):
    golden = (
        ({"prompt": "1 + 1 =", "completion": " 2"}, Completion("1 + 1 =", " 2")),
        ({"prompt": "1 + 1 =", "completion": " 2", "weight": 0.5}, Completion("1 + 1 =", " 2", 0.5)),
        (
            {
                "prompt": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Yo"},
                    {"role": "user", "content": "And?"},
                ],
                "completion": [{"role": "assistant", "content": "Well."}],
            },
            Conversation(
                (
                    Message("user", "Hi"),
                    Message("assistant", "Yo"),
                    Message("user", "And?"),
                    Message("assistant", "Well."),
                ),
                given=3,
            ),
        ),
    )
    bad = (
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "completion"),
        ({"prompt": [{"role": "user", "content": "b"}], "completion": "a"}, "completion"),
        ({"prompt": "", "completion": "a"}, "prompt"),
        ({"prompt": "a", "completion": 3}, "completion"),
    )

    def make(self):
        return PromptCompletion()


class TestRawText(RowFormatSuite):
    golden = (
        ({"text": "Once upon a time."}, Text("Once upon a time.")),
        ({"text": "Once", "weight": 3}, Text("Once", 3.0)),
    )
    bad = (({"text": " "}, "text"), ({"text": ["a"]}, "text"), ({"text": "a", "weight": "inf"}, "weight"))

    def make(self):
        return RawText()


def segments(*stretches):
    return {"segments": [{"text": text, "label": label} for text, label in stretches]}


class TestSegments(RowFormatSuite):
    golden = (
        (segments(("2+2=", False), ("4", True)), Completion("2+2=", "4")),
        (segments(("4", True)), Completion("", "4")),
        (segments(("a", False), ("b", False), ("c", True), ("d", False)), Completion("b", "c", 1.0, (("a", False),))),
        (
            {**segments(("a", True), ("", False), ("b", False), ("c", True)), "weight": 2},
            Completion("b", "c", 2.0, (("a", True),)),
        ),
        (segments(("a", True), ("c", True)), Completion("", "c", 1.0, (("a", True),))),
        ({"segments": '[{"text": "2+2=", "label": false}, {"text": "4", "label": true}]'}, Completion("2+2=", "4")),
    )
    bad = (
        ({"segments": []}, "segments"),
        ({"segments": "a"}, "segments"),
        (segments(("a", False)), "segments"),
        (segments(("a", "yes")), "segments"),
        ({"segments": [{"text": 4, "label": True}]}, "segments"),
        ({"segments": ["a"]}, "segments"),
    )

    def make(self):
        return Segments()


class Mutates(RowFormat):
    def __call__(self, row):
        row["seen"] = True
        return Conversation((Message("user", row["q"]), Message("assistant", row["a"])))


class NoAnswer(RowFormat):
    def __call__(self, row):
        return Conversation((Message("user", row["q"]),))


class RaisesKeyError(RowFormat):
    def __call__(self, row):
        return Conversation((Message("user", row["q"]), Message("assistant", row["a"])))


def failures(kind):
    class Suite(RowFormatSuite):
        golden = (({"q": "Hi?", "a": "Yes."}, (("user", "Hi?"), ("assistant", "Yes."))),)
        bad = (({"q": "Hi?"}, "a"),)

        def make(self):
            return kind()

    failed = set()
    for name in dir(Suite):
        if name.startswith("test_"):
            try:
                getattr(Suite(), name)()
            except (Exception, pytest.fail.Exception):
                failed.add(name)
    return failed


def test_the_suite_rejects_broken_formats():
    assert "test_golden_rows" in failures(Mutates)
    assert {"test_golden_rows", "test_rows_can_be_trained_on"} <= failures(NoAnswer)
    assert failures(RaisesKeyError) == {"test_bad_rows_name_their_column"}
