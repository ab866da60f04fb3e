"""Every shape that rows of preferences have, and what is wrong with some."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlit.data.formats import Completion, Conversation, Labelled, Message, Pairs, Ranking, detect_preference
from ftlit.data.formats.asked import shared_text
from ftlit.data.formats.base import Comparison, RowError
from ftlit.errors import DataError
from ftlit.testing import RowFormatSuite

USER, YES, NO = Message("user", "Hi?"), Message("assistant", "Yes."), Message("assistant", "No.")
SYSTEM = Message("system", "Be kind.")
KIND = Message("system", "Be kind.")
PAIR = Comparison((Conversation((USER, YES), given=1), Conversation((USER, NO), given=1)), (1.0, 0.0))


def turn(role, content):
    return {"role": role, "content": content}


def said(name, value):
    return {"from": name, "value": value}


TEXTS = Comparison((Completion("2+2=", "4"), Completion("2+2=", "5")), (1.0, 0.0))
LONG = (USER, YES, Message("user", "Why?"))


class TestPairs(RowFormatSuite):
    golden = (
        ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, TEXTS),
        ({"prompt": "2+2=", "chosen": "4", "rejected": "5", "margin": 2, "weight": "0.5"},
         TEXTS._replace(margin=2.0, weight=0.5)),
        ({"prompt": [turn("user", "Hi?")], "chosen": [turn("assistant", "Yes.")],
          "rejected": [turn("assistant", "No.")]}, PAIR),
        ({"prompt": "Hi?", "chosen": [turn("assistant", "Yes.")], "rejected": [turn("assistant", "No.")]}, PAIR),
        ({"prompt": "Hi?", "chosen": [turn("user", "Hi?"), turn("assistant", "Yes.")],
          "rejected": [turn("user", "Hi?"), turn("assistant", "No.")]}, PAIR),
        ({"messages": [turn("user", "Hi?")], "chosen": "Yes.", "rejected": "No."}, PAIR),
        ({"instruction": "Hi?", "input": "", "chosen": "Yes.", "rejected": "No."}, PAIR),
        ({"conversations": [said("human", "Hi?")], "chosen": said("gpt", "Yes."), "rejected": said("gpt", "No.")},
         PAIR),
        ({"chosen": [said("human", "Hi?"), said("gpt", "Yes.")],
          "rejected": [said("human", "Hi?"), said("gpt", "No.")]}, PAIR),
        ({"prompt": [turn("user", "Hi?")], "chosen": "Yes.", "rejected": "No.", "system": "Be kind."},
         Comparison((Conversation((SYSTEM, USER, YES), given=2),
                     Conversation((SYSTEM, USER, NO), given=2)), (1.0, 0.0))),
        # A conversation of several turns: what is alike is the prompt.
        ({"chosen": [turn("user", "Hi?"), turn("assistant", "Yes."), turn("user", "Why?"), turn("assistant", "Yes.")],
          "rejected": [turn("user", "Hi?"), turn("assistant", "Yes."), turn("user", "Why?"), turn("assistant", "No.")]},
         Comparison((Conversation((*LONG, YES), given=3), Conversation((*LONG, NO), given=3)), (1.0, 0.0))),
        # They part in a user's turn: the assistant's turn before it opens both answers and is not trained.
        ({"chosen": [turn("user", "Hi?"), turn("assistant", "Yes."), turn("user", "Why?"), turn("assistant", "No.")],
          "rejected": [turn("user", "Hi?"), turn("assistant", "Yes."), turn("user", "Hi?"), turn("assistant", "No.")]},
         Comparison((Conversation((USER, YES._replace(weight=0.0), LONG[2], NO), given=1),
                     Conversation((USER, YES._replace(weight=0.0), USER, NO), given=1)), (1.0, 0.0))),
        # One goes on where the other ends.
        ({"chosen": [turn("user", "Hi?"), turn("assistant", "Yes.")],
          "rejected": [turn("user", "Hi?"), turn("assistant", "Yes."), turn("user", "Why?"), turn("assistant", "No.")]},
         Comparison((Conversation((USER, YES), given=1), Conversation((*LONG, NO), given=1)), (1.0, 0.0))),
        # Whole texts: the prompt ends with a word.
        ({"chosen": "Human: Hi? Assistant: unbelievable", "rejected": "Human: Hi? Assistant: unbelievably"},
         Comparison((Completion("Human: Hi? Assistant:", " unbelievable"),
                     Completion("Human: Hi? Assistant:", " unbelievably")), (1.0, 0.0))),
        # A system column makes turns of texts.
        ({"prompt": "Hi?", "system": "Be kind.", "chosen": "Yes.", "rejected": "No."},
         Comparison((Conversation((KIND, USER, YES), given=2), Conversation((KIND, USER, NO), given=2)), (1.0, 0.0))),
        ({"prompt": "Hi?", "system": "", "chosen": "Yes.", "rejected": "No."}, PAIR),
        # Empty answers are read here, and counted where rows are tokenized.
        ({"prompt": "2+2=", "chosen": "4", "rejected": " "},
         Comparison((Completion("2+2=", "4"), Completion("2+2=", "")), (1.0, 0.0))),
        ({"prompt": [turn("user", "Hi?")], "chosen": [turn("assistant", "Yes.")], "rejected": [turn("assistant", "")]},
         Comparison((Conversation((USER, YES), given=1), Conversation((USER,), given=1)), (1.0, 0.0))),
    )  # fmt: skip
    bad = (
        ({"prompt": "Hi?", "chosen": "Yes.", "rejected": None}, "rejected"),
        ({"prompt": "Hi?", "chosen": 3, "rejected": "No."}, "chosen"),
        ({"prompt": "Hi?", "chosen": [], "rejected": "No."}, "chosen"),
        ({"prompt": "", "chosen": "Yes.", "rejected": "No."}, "prompt"),
        ({"prompt": [turn("user", "Hi?"), turn("assistant", "Well.")], "chosen": "Yes.", "rejected": "No."}, "prompt"),
        ({"chosen": "Yes.", "rejected": "No."}, "prompt"),
        ({"chosen": [turn("assistant", "Yes.")], "rejected": [turn("assistant", "No.")]}, "prompt"),
        ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "margin": -1}, "margin"),
        ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "weight": "much"}, "weight"),
        ({"prompt": "Hi?", "chosen": [turn("user", "Hi?"), turn("assistant", "Yes.")], "rejected": "No."}, "rejected"),
        ({"chosen": [turn("user", "Hi?"), turn("assistant", "Yes.")],
          "rejected": [turn("user", "Ho?"), turn("assistant", "No.")]}, "rejected"),
        ({"prompt": "Hi?", "chosen": [turn("assistant", "A"), turn("user", "B")], "rejected": "No."}, "chosen"),
        ({"chosen": [turn("user", "Hi?"), turn("assistant", "Yes.")],
          "rejected": [turn("user", "Hi?"), turn("user", "No.")]}, "rejected"),
        ({"prompt": "Hi?", "chosen": "Yes.", "rejected": [turn("assistant", "A"), turn("user", "B")]}, "rejected"),
        ({"prompt": "Hi?", "chosen": said("alien", "Yes."), "rejected": "No."}, "chosen"),
    )  # fmt: skip

    def make(self):
        return Pairs()


class TestRanking(RowFormatSuite):
    golden = (
        ({"prompt": "2+2=", "answers": ["4", "5", "6"]},
         Comparison(tuple(Completion("2+2=", text) for text in "456"), (3.0, 2.0, 1.0))),
        ({"prompt": "2+2=", "answers": ["5", "4", "6"], "scores": [1, 9, 1]},
         Comparison(tuple(Completion("2+2=", text) for text in "456"), (9.0, 1.0, 1.0), places=(1, 0, 2))),
        ({"prompt": [turn("user", "Hi?")], "answers": ["Yes.", [turn("assistant", "No.")]]},
         PAIR._replace(grades=(2.0, 1.0))),
    )  # fmt: skip
    bad = (
        ({"prompt": "2+2=", "answers": ["4"]}, "answers"),
        ({"prompt": "2+2=", "answers": "4"}, "answers"),
        ({"prompt": "2+2=", "answers": ["4", None]}, "answers"),
        ({"prompt": "2+2=", "answers": ["4", turn("user", "5")]}, "answers"),
        ({"prompt": "2+2=", "answers": ["4", "5"], "scores": [1]}, "scores"),
        ({"prompt": "2+2=", "answers": ["4", "5"], "scores": [1, "b"]}, "scores"),
        ({"answers": ["4", "5"]}, "prompt"),
    )

    def make(self):
        return Ranking()


class TestLabelled(RowFormatSuite):
    golden = (
        ({"prompt": "2+2=", "completion": "4", "label": True}, Comparison((Completion("2+2=", "4"),), (1.0,))),
        ({"prompt": "2+2=", "completion": "5", "label": "False"}, Comparison((Completion("2+2=", "5"),), (0.0,))),
        ({"messages": [turn("user", "Hi?"), turn("assistant", "Yes.")], "label": 1},
         Comparison((Conversation((USER, YES), given=1),), (1.0,))),
        ({"conversations": [said("human", "Hi?"), said("gpt", "No.")], "label": 0},
         Comparison((Conversation((USER, NO), given=1),), (0.0,))),
        ({"prompt": [turn("user", "Hi?")], "completion": [turn("assistant", "Yes.")], "label": True},
         Comparison((Conversation((USER, YES), given=1),), (1.0,))),
    )  # fmt: skip
    bad = (
        ({"prompt": "2+2=", "completion": "4", "label": "good"}, "label"),
        ({"prompt": "2+2=", "completion": "4", "label": None}, "label"),
        ({"prompt": "2+2=", "label": True}, "completion"),
        ({"completion": "4", "label": True}, "prompt"),
        ({"prompt": "2+2=", "completion": turn("user", "4"), "label": True}, "completion"),
        ({"messages": [turn("user", "Hi?")], "label": True}, "messages"),
    )

    def make(self):
        return Labelled()


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (("prompt", "chosen", "rejected"), Pairs),
        (("chosen", "rejected", "score_chosen"), Pairs),
        (("prompt", "answers"), Ranking),
        (("prompt", "completion", "label"), Labelled),
    ],
)
def test_the_format_follows_from_the_columns(columns, kind):
    assert type(detect_preference(columns, "rows.jsonl")) is kind


def test_no_format_fits():
    with pytest.raises(DataError, match=r"rows.jsonl: columns a, b fit no preference format .* data.columns: \{chosen"):
        detect_preference(["a", "b"], "rows.jsonl")
    assert type(detect_preference(["messages"], "rows.jsonl", answers=False)).__name__ == "Messages"


@pytest.mark.parametrize(
    ("columns", "advice"),
    [
        (("question", "better", "worse"), "{chosen: better, rejected: worse}"),
        (("prompt", "chosen"), "{rejected: WORSE}"),
        (("prompt", "responses"), "{answers: responses}"),
        (("messages", "liked"), "{label: liked}"),
    ],
)
def test_columns_are_suggested(columns, advice):
    with pytest.raises(DataError, match=f"such as data.columns: {advice}".replace("{", r"\{")):
        detect_preference(columns, "rows.jsonl")


WORDS = st.lists(st.sampled_from(["a", "ab", "abc", "b", "é", "42"]), min_size=1, max_size=8).map(" ".join)


@given(WORDS, WORDS)
def test_shared_words_end_with_a_word(first, second):
    """The prompt and the rests give the texts back, the prompt is whole words of both, and no word more is shared."""
    try:
        prompt, rests = shared_text(first, second)
    except RowError:
        alike = first.split()[0] == second.split()[0]
        assert not alike or min(len(first.split()), len(second.split())) == 1  # a word is left for each
        return
    assert [prompt + rest for rest in rests] == [first, second]
    words = prompt.split()
    assert first.split()[: len(words)] == second.split()[: len(words)] == words
    more = [text.split()[len(words) :] for text in (first, second)]
    assert all(more)
    assert more[0][0] != more[1][0] or min(map(len, more)) == 1


def test_answers_of_which_one_begins_as_the_other():
    assert shared_text("Q? Yes", "Q? Yes sir") == ("Q?", [" Yes", " Yes sir"])
    assert shared_text("问：好？答：好", "问：好？答：不") == ("问：好？答：", ["好", "不"])


RULE, ASKED, SAID, NEXT = (
    {"role": role, "content": text}
    for role, text in (("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"))
)
ANSWERS = [{"role": "assistant", "content": text} for text in ("good", "bad")]


@pytest.mark.parametrize(
    ("prompt", "begin", "expected"),
    [
        ([RULE, ASKED, SAID], [NEXT], [RULE, ASKED, SAID, NEXT]),  # a history
        ([RULE, ASKED, SAID, NEXT], [ASKED, SAID, NEXT], [RULE, ASKED, SAID, NEXT]),  # the system turn is only there
        ([NEXT], [RULE, NEXT], [RULE, NEXT]),
        ("c", [NEXT], [NEXT]),
        ([RULE], [NEXT], [RULE, NEXT]),
    ],
)
def test_what_a_prompt_says_before_whole_conversations_is_kept(prompt, begin, expected):
    row = {"prompt": prompt, "chosen": [*begin, ANSWERS[0]], "rejected": [*begin, ANSWERS[1]]}
    found = Pairs()(row)
    for answer, last in zip(found.answers, ANSWERS, strict=True):
        assert [message.turn() for message in answer.messages] == [*expected, last]
        assert answer.given == len(expected)


def test_a_history_beside_a_system_column():
    begin = {"system": "S", "prompt": [ASKED, SAID]}
    row = begin | {name: [NEXT, one] for name, one in zip(("chosen", "rejected"), ANSWERS, strict=True)}
    for answer in Pairs()(row).answers:
        assert [message.turn() for message in answer.messages[: answer.given]] == [RULE, ASKED, SAID, NEXT]
    assert [message.turn() for message in Pairs().prompt(row).messages] == [RULE, ASKED, SAID, NEXT]


def test_a_prompt_of_another_conversation_is_refused():
    with pytest.raises(RowError, match="turns that chosen and rejected begin with"):
        Pairs()({"prompt": "other", "chosen": [NEXT, ANSWERS[0]], "rejected": [NEXT, ANSWERS[1]]})
