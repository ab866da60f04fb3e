import pytest

from ftlit.data.formats import Alpaca, Conversation, Message, Messages, RowFormat
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
    bad = (({"messages": []}, "messages"), ({"messages": [{"role": "bot", "content": "x"}]}, "messages"))

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
    assert {"test_golden_rows", "test_turns_can_be_trained_on"} <= failures(NoAnswer)
    assert failures(RaisesKeyError) == {"test_bad_rows_name_their_column"}
