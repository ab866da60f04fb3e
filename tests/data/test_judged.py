"""Answers of which a column says which is better, ranked ones, and labels, as public data sets have them."""

import json

import pytest

from ftlit.data.formats import Completion, Judged, Pairs, Ranking, detect_preference
from ftlit.data.formats.base import RowError
from ftlit.data.preferences import PreferenceData
from ftlit.errors import DataError
from ftlit.export.rating import contents_of
from ftlit.testing import RowFormatSuite, tiny_tokenizer

ASKED = [{"role": "user", "content": "Hi?"}]
YES, NO = ([*ASKED, {"role": "assistant", "content": text}] for text in ("Yes.", "No."))


def read(row, kind=None):
    """The last question and the answers of a row, the best first, with their grades."""
    read_by = kind or detect_preference(row, "rows.jsonl")
    found = read_by(row)
    first = found.answers[0]
    if isinstance(first, Completion):
        return first.prompt, [one.completion for one in found.answers], found.grades
    return first.messages[first.given - 1].content, [one.messages[-1].content for one in found.answers], found.grades


BEST = ("Hi?", ["Yes.", "No."], (1.0, 0.0))
TIE = ("Hi?", ["Yes.", "No."], (0.0, 0.0))
SAFE = {"prompt": "Hi?", "response_0": "No.", "response_1": "Yes."}
SHP = {"history": "Hi?", "human_ref_A": "Yes.", "human_ref_B": "No.", "score_A": 5, "score_B": 9, "score_ratio": 2.0}
ARENA = {"model_a": "x", "model_b": "y", "conversation_a": YES, "conversation_b": NO, "turn": 1}
HELP = {"prompt": "Hi?", "response_1": "Yes.", "response_2": "No."}
FLAGS = {"prompt": "Hi?", "response_a": "Yes.", "response_b": "No.", "winner_model_a": 1, "winner_model_b": 0}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**SHP, "labels": 1}, BEST),
        ({**SHP, "human_ref_A": "No.", "human_ref_B": "Yes.", "labels": 0}, BEST),
        ({**SAFE, "better_response_id": 1, "is_response_0_safe": True}, BEST),
        ({**SAFE, "safer_response_id": "1"}, BEST),
        ({**SAFE, "winner": 1.0, "better_response_id": 0, "safer_response_id": 0}, BEST),
        ({**ARENA, "winner": "model_a", "judge": "z"}, BEST),
        ({**ARENA, "winner": "tie"}, TIE),
        ({**ARENA, "winner": "tie (bothbad)"}, TIE),
        (FLAGS | {"winner_tie": 0}, BEST),
        (FLAGS | {"winner_model_a": 0, "winner_tie": 1}, TIE),
        (FLAGS | {"prompt": '["Hi?"]', "response_a": '["Yes."]', "response_b": '["No."]'}, BEST),
        (FLAGS | {"prompt": ["Hi?"], "response_a": ["Yes."], "response_b": ["No."]}, BEST),
        ({**HELP, "preference_strength": -2, "preference_statement": "So."}, BEST),
        ({"context": ASKED, "response1": "No.", "response2": "Yes.", "overall_preference": 3}, BEST),
        ({**HELP, "preference_strength": 0}, TIE),
        ({"instruction": "Hi?", "input": "", "output_1": "No.", "output_2": "Yes.", "preference": 2}, BEST),
        ({"question": "Hi?", "answer_0": "Yes.", "answer_1": "No.", "score_0": 0.5, "score_1": -0.5}, BEST),
        ({"prompt": "Hi?", "response_A": "Yes.", "response_B": "No.", "preference": "A"}, BEST),
        ({"prompt": "\n\nHuman: Hi?\n\nAssistant:", "response_0": " Yes.", "response_1": " No.",
          "winner": "response_0"}, ("\n\nHuman: Hi?\n\nAssistant:", [" Yes.", " No."], (1.0, 0.0))),
        # rankings
        ({"prompt": "Hi?", "answers": [{"answer": "No.", "model": "x", "rank": 2.0},
                                       {"answer": "Yes.", "model": "y", "rank": 1.0}]}, ("Hi?", BEST[1], (-1.0, -2.0))),
        ({"instruction": "Hi?", "completions": [{"response": "No.", "overall_score": 2},
                                                {"response": "Yes.", "overall_score": 8.5}]},
         ("Hi?", BEST[1], (8.5, 2.0))),
        ({"prompt": "Hi?", "answers": json.dumps(["Yes.", "No."])}, ("Hi?", BEST[1], (2.0, 1.0))),
        # pairs under other names
        ({"input": {"messages": ASKED, "tools": []}, "preferred_output": YES[1:],
          "non_preferred_output": NO[1:]}, BEST),
        ({"question": "Hi?", "response_j": "Yes.", "response_k": "No."}, BEST),
        ({"messages": YES, "rejected_response": "No."}, BEST),
        ({"messages": YES, "rejected_messages": NO}, BEST),
        # labels
        ({"instruction": "Hi?", "input": "", "output": "Yes.", "kto_tag": True}, ("Hi?", ["Yes."], (1.0,))),
        ({"messages": NO, "kto_tag": "false"}, ("Hi?", ["No."], (0.0,))),
        ({"question": "Hi?", "response": "No.", "label": "undesirable"}, ("Hi?", ["No."], (0.0,))),
        ({"prompt": "Hi?", "completion": "Yes.", "label": 1}, ("Hi?", ["Yes."], (1.0,))),
    ],
)  # fmt: skip
def test_public_shapes_are_read(row, expected):
    assert read(row) == expected


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({**SAFE, "better_response_id": 1, "safer_response_id": 0},
         r"choose one: data.columns=\{winner: better_response_id\} or data.columns=\{winner: safer_response_id\}"),
        ({**SAFE, "winner": 2}, "'winner' must hold 0 or 1, the better answer, or tie"),
        ({**SAFE, "winner": None}, "'winner' must hold 0 or 1"),
        ({"prompt": "Hi?", "response_a": "Yes.", "response_b": "No.", "winner": 1}, "a or b, .*first_wins"),
        ({**FLAGS, "winner_model_b": 1}, "'winner_model_b' must hold 0 or 1, and not 1 where"),
        ({**HELP, "preference_strength": "much"}, "'preference_strength' must hold a number"),
        ({"instruction": "Hi?", "completions": [{"response": "No.", "overall_score": 2, "fine-grained_score": 3},
                                                {"response": "Yes.", "overall_score": 8, "fine-grained_score": 4}]},
         "choose one: data.format={class_path: Ranking, init_args: {column: completions, score: overall_score}}"),
        ({"prompt": "Hi?", "completions": ["Yes.", "No."]}, "objects with a rank or a score"),
        ({"prompt": "Hi?", "completion": "Yes.", "label": "good"}, "'label' must hold true or false"),
    ],
)  # fmt: skip
def test_what_has_no_one_meaning_is_refused(row, sentence):
    with pytest.raises(DataError, match=sentence.replace("={class", r"=\{class").replace("args: {", r"args: \{")):
        read(row)


def test_values_of_a_verdict_can_be_given():
    row = {"prompt": "Hi?", "response_a": "Yes.", "response_b": "No.", "winner": "left"}
    made = Judged("response_a", "response_b", first_wins="left", second_wins="right")
    assert read(row, made) == read({**row, "response_a": "No.", "response_b": "Yes.", "winner": "Right"}, made) == BEST
    with pytest.raises(RowError, match="left or right"):
        made({**row, "winner": "up"})
    graded = {
        "prompt": "Hi?",
        "answers": [{"text": "No.", "score": 1, "rating": 9}, {"text": "Yes.", "score": 2, "rating": 1}],
    }
    assert read(graded, Ranking(score="score"))[1] == ["Yes.", "No."]
    assert read(graded, Ranking(score="rating"))[1] == ["No.", "Yes."]


def test_scores_are_a_margin_where_that_is_asked_for():
    row = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "score_chosen": 8.5, "score_rejected": "7"}
    assert Pairs()(row).margin == 0
    made = Pairs(margin_of=["score_chosen", "score_rejected"])
    assert made(row).margin == 1.5
    with pytest.raises(RowError, match="'score_chosen' must hold at least"):
        made({**row, "score_chosen": 6})
    with pytest.raises(RowError, match="'score_rejected' must hold a number"):
        made({**row, "score_rejected": None})


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_ties_are_dropped_and_counted_and_the_user_chooses_the_verdict(tmp_path):
    rows = [{**SAFE, "better_response_id": 1, "safer_response_id": 0, "prompt": f"Hi {i}?"} for i in range(3)]
    rows[2]["safer_response_id"] = "tie"
    path = write(tmp_path, rows)
    for column, kept, chosen in (("better_response_id", 3, "Yes."), ("safer_response_id", 2, "No.")):
        data = PreferenceData(train=path, columns={"winner": column}, cache=False)
        data.use_tokenizer(tiny_tokenizer())
        data.load_train()
        assert len(data.sets["train"]) == kept
        assert chosen in data.rendered(0).split("--- rejected")[0]
        assert data.statistics[0].drops == ({"answers equal, or equally good": 1} if kept == 2 else {})
    with pytest.raises(DataError, match=r"rows.jsonl: several columns say"):
        PreferenceData(train=path)._open("train", [path])


def test_both_answers_of_a_judged_row_are_scored(tmp_path):
    found = contents_of(write(tmp_path, [{**SAFE, "better_response_id": 1, "safer_response_id": 0}]))
    assert [(one.row, one.content.messages[-1].content, one.shown["answer"]) for one in found] == [
        (0, "No.", 1), (0, "Yes.", 2)
    ]  # fmt: skip


class TestJudged(RowFormatSuite):
    golden = (({**SAFE, "winner": 1}, Judged()({**SAFE, "winner": 1})),)
    bad = (({**SAFE, "winner": "x"}, "winner"), ({**SAFE, "winner": 1, "response_1": 3}, "response_1"))

    def make(self):
        return Judged()


def test_answers_of_several_turns_part_where_they_differ():
    """Lists of texts, one a turn, as arena-human-preference-55k has them in JSON."""
    asked, good, bad = ["Hi?", "Sure?"], ["Yes.", "Yes!"], ["No.", "No!"]
    row = {**FLAGS, "prompt": json.dumps(asked), "response_a": json.dumps(good), "response_b": json.dumps(bad)}
    found = detect_preference(row, "rows.jsonl")(row)
    first, second = found.answers
    assert [(m.role, m.content) for m in first.messages] == [
        ("user", "Hi?"), ("assistant", "Yes."), ("user", "Sure?"), ("assistant", "Yes!")
    ]  # fmt: skip
    assert [m.content for m in second.messages] == ["Hi?", "No.", "Sure?", "No!"]
    assert first.given == second.given == 1


@pytest.mark.parametrize("torn", ['["Yes.", null]', '["Yes."]', '["Yes.", " "]', '["Yes.", 3]'])
def test_lists_of_turns_that_do_not_fit_are_refused(torn):
    row = {**FLAGS, "prompt": '["Hi?", "Sure?"]', "response_a": torn, "response_b": '["No.", "No!"]'}
    with pytest.raises(RowError, match=r"response_a.*as many texts as prompt and answers have turns"):
        detect_preference(row, "rows.jsonl")(row)
