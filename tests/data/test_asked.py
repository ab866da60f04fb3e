"""A prompt that a row gives twice, in columns and in answers, and context that stands in columns of its own."""

import json

import pytest

from ftlit.data.formats import Completion, Conversation, Labelled, Message, Pairs, Ranking
from ftlit.data.formats.base import RowError
from ftlit.data.preferences import PreferenceData
from ftlit.data.prompts import PromptData
from ftlit.data.sources import Source
from ftlit.testing import tiny_tokenizer


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def rule(text):
    return {"role": "system", "content": text}


def said(name, text):
    return {"from": name, "value": text}


GOOD, BAD = [user("Hi?"), says("Yes.")], [user("Hi?"), says("No.")]
WHOLE = {"chosen": GOOD, "rejected": BAD}
ANSWERS = {"chosen": [says("Yes.")], "rejected": [says("No.")]}
TEXTS = {"chosen": "Yes.", "rejected": "No."}
LONG = [user("Hi?"), says("Yes."), user("Why?")]
LONGER = {"chosen": [*LONG, says("So.")], "rejected": [*LONG, says("Thus.")]}
HH = "\n\nHuman: Hi?\n\nAssistant:"
RULE = "Be kind."


def read(row, kind=Pairs):
    """Prompt and answers of a row: texts, or lists of (role, content)."""
    found = kind()(row)
    first = found.answers[0]
    if isinstance(first, Completion):
        assert len({one.prompt for one in found.answers}) == 1
        return first.prompt, [one.completion for one in found.answers]
    turns = [[(m.role, m.content) for m in one.messages] for one in found.answers]
    return turns[0][: first.given], [one[first.given :] for one in turns]


def chat(*contents, system=None):
    """A prompt of turns that alternate."""
    roles = ["user", "assistant"] * len(contents)
    return [("system", system)] * (system is not None) + list(zip(roles, contents, strict=False))


ONE = (chat("Hi?"), [[("assistant", "Yes.")], [("assistant", "No.")]])
KIND = (chat("Hi?", system=RULE), ONE[1])
SECOND = (chat("Hi?", "Yes.", "Why?"), [[("assistant", "So.")], [("assistant", "Thus.")]])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # ultrafeedback_binarized and its kin
        ({"prompt": "Hi?", "messages": GOOD, **WHOLE, "score_chosen": 8.0, "score_rejected": 7.0}, ONE),
        ({"prompt": "Hi?", "messages": BAD, **WHOLE}, ONE),
        ({"prompt": [user("Hi?")], "messages": GOOD, **WHOLE}, ONE),
        ({"prompt": "Hi?", "conversations": [said("human", "Hi?"), said("gpt", "Yes.")], **WHOLE}, ONE),
        ({"instruction": "Hi?", "question": "Hi?", **WHOLE}, ONE),
        ({"prompt": " Hi? ", "messages": [rule(RULE), *GOOD], **WHOLE}, KIND),
        ({"prompt": "Hi?", "messages": LONGER["chosen"], **LONGER}, SECOND),
        ({"prompt": "Why?", **LONGER}, SECOND),  # the last question of several
        ({"prompt": LONG, **LONGER}, SECOND),
        ({"prompt": LONG[:1], **LONGER}, SECOND),
        ({"messages": LONG, "prompt": "Why?", "chosen": "So.", "rejected": "Thus."}, SECOND),
        # the copy of an answer beside answers that are not whole
        ({"messages": GOOD, **TEXTS}, ONE),
        ({"prompt": "Hi?", "messages": GOOD, **ANSWERS}, ONE),
        ({"conversations": [said("human", "Hi?"), said("gpt", "Yes.")], "chosen": said("gpt", "Yes."),
          "rejected": said("gpt", "No.")}, ONE),
        # a prompt with the marks of a template or of speakers
        ({"prompt": "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n", **WHOLE}, ONE),
        ({"prompt": HH, **WHOLE}, ONE),
        ({"prompt": "### Instruction:\nHi?\n\n### Response:\n", "instruction": "Hi?", **TEXTS}, ONE),
        # the system turn stands with one of them only
        ({"prompt": [rule(RULE), user("Hi?")], **WHOLE}, KIND),
        ({"prompt": "Hi?", "system": RULE, **WHOLE}, KIND),
        ({"prompt": [rule(RULE), user("Hi?")], "system": RULE, **ANSWERS}, KIND),
        # texts that are whole
        ({"prompt": HH, "chosen": HH + " Yes.", "rejected": HH + " No."}, (HH, [" Yes.", " No."])),
        ({"prompt": HH + " ", "chosen": HH + " Yes.", "rejected": HH + " No."}, (HH, [" Yes.", " No."])),
        ({"prompt": "Human: Hi?", "chosen": "Human: Hi?\nAssistant: Yes.", "rejected": "Human: Hi?\nAssistant: No."},
         ("Human: Hi?\nAssistant:", [" Yes.", " No."])),
        # an answer may begin as a short prompt does
        ({"prompt": "Hi", "chosen": "Hi there.", "rejected": "Hi."}, ("Hi", ["Hi there.", "Hi."])),
    ],
)  # fmt: skip
def test_a_prompt_that_is_given_twice_is_there_once(row, expected):
    assert read(row) == expected
    unanswered = Pairs().prompt(row)
    if isinstance(unanswered, Conversation):
        assert [(m.role, m.content) for m in unanswered.messages] == expected[0]
    else:
        assert unanswered.prompt == expected[0]


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"messages": [user("Hi?"), says("Well.")], **WHOLE}, "messages"),  # a third answer
        ({"messages": [*GOOD, user("Why?"), says("So.")], **WHOLE}, "messages"),  # goes on after chosen
        ({"prompt": "Ho?", **WHOLE}, "prompt"),
        ({"prompt": "Hi?", "messages": [user("Ho?")], **TEXTS}, "prompt"),
        ({"instruction": "Hi?", "prompt": "Ho?", **TEXTS}, "prompt"),
        ({"prompt": "Hi?", "input": "A long text.", **TEXTS}, "input"),
        ({"messages": [user("Hi?"), says("Well.")], **TEXTS}, "prompt"),
        ({"prompt": "What is the sum of one and two?", "chosen": "What is the sum of one and two? 3",
          "rejected": "What is the sum of one and two? 4"}, "chosen"),
        ({"prompt": [rule("Be brief."), user("Hi?")], "system": RULE, **ANSWERS}, "system"),
        ({"prompt": "<|im_start|>user\nHi?<|im_end|>\n", **ANSWERS}, "prompt"),
    ],
)  # fmt: skip
def test_what_has_no_one_meaning_is_refused(row, column):
    with pytest.raises(RowError) as caught:
        Pairs()(row)
    assert caught.value.column == column


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # LLaMA-Factory
        ({"instruction": "Why?", "input": "", "history": [["Hi?", "Yes."]], "chosen": "So.", "rejected": "Thus."},
         SECOND),
        ({"prompt": "Why?", "history": [["Hi?", "Yes."]], "chosen": "So.", "rejected": "Thus."}, SECOND),
        ({"prompt": "Why?", "history": GOOD, "chosen": "So.", "rejected": "Thus."}, SECOND),
        ({"prompt": LONG, "history": [["Hi?", "Yes."]], "chosen": "So.", "rejected": "Thus."}, SECOND),
        ({"history": [["Hi?", "Yes."]], **{name: turns[2:] for name, turns in LONGER.items()}}, SECOND),
        ({"history": [["Hi?", "Yes."]], **LONGER}, SECOND),
        ({"instruction": "Why?", "history": [["Hi?", "Yes."]], "system": RULE, "chosen": "So.", "rejected": "Thus."},
         ([("system", RULE), *SECOND[0]], SECOND[1])),
        ({"instruction": "Hi?", "history": [], **TEXTS}, ONE),
        # orca_dpo_pairs, distilabel's copy of it, truthy-dpo
        ({"system": RULE, "question": "Hi?", **TEXTS}, KIND),
        ({"system": RULE, "input": "Hi?", **TEXTS}, KIND),
        ({"system": "", "question": "Hi?", **TEXTS}, ONE),
        ({"system": None, "prompt": "Hi?", **TEXTS}, ONE),
        ({"system_prompt": RULE, "question": "Hi?", **TEXTS}, KIND),
        ({"question": "Hi?", **TEXTS}, ONE),
        ({"prompt": "Q: Hi?\nA:", "question": "Hi?", **TEXTS}, ("Q: Hi?\nA:", ["Yes.", "No."])),
        ({"history": "A long post.", **TEXTS}, (chat("A long post."), ONE[1])),
        # cells of tables
        ({name: json.dumps(turns) for name, turns in WHOLE.items()}, ONE),
        ({name: str(turns) for name, turns in WHOLE.items()}, ONE),
        ({name: str(turns).replace(", {", "\n {") for name, turns in WHOLE.items()}, ONE),  # as NumPy prints it
        ({"prompt": str([user("Hi?")]), **TEXTS}, ONE),
        ({"messages": json.dumps([user("Hi?")]), "chosen": str(says("Yes.")), "rejected": json.dumps(says("No."))},
         ONE),
        # an answer may be JSON itself
        ({"prompt": "Q", "chosen": '{"role": "admin"}', "rejected": '[{"value": 1}]'},
         ("Q", ['{"role": "admin"}', '[{"value": 1}]'])),
        # HH-RLHF: the answer begins after the last mark that both have
        ({"chosen": HH + " Yes, I can.", "rejected": HH + " Yes, I cannot."},
         (HH, [" Yes, I can.", " Yes, I cannot."])),
        ({"chosen": HH + " A.\n\nHuman: B?\n\nAssistant: Well, C.",
          "rejected": HH + " A.\n\nHuman: B?\n\nAssistant: Well."},
         (HH + " A.\n\nHuman: B?\n\nAssistant:", [" Well, C.", " Well."])),
        ({"chosen": HH + " Sure:\nAnswer: 1", "rejected": HH + " Sure:\nAnswer: 2"},
         (HH, [" Sure:\nAnswer: 1", " Sure:\nAnswer: 2"])),
        ({"chosen": "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes, I",
          "rejected": "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes, you"},
         ("<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n", ["Yes, I", "Yes, you"])),
        ({"chosen": "[INST] Hi? [/INST] It is", "rejected": "[INST] Hi? [/INST] It was"},
         ("[INST] Hi? [/INST]", [" It is", " It was"])),
        ({"chosen": "Q: Hi?\nA: unbelievable", "rejected": "Q: Hi?\nA: unbelievably"},
         ("Q: Hi?\nA:", [" unbelievable", " unbelievably"])),
    ],
)  # fmt: skip
def test_all_of_the_context_is_there(row, expected):
    assert read(row) == expected


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"post": "A post.", "chosen": "I think so", "rejected": "I think not"},
         r"is it 'post'\? data.columns=\{prompt: post"),
        ({"context": "A text.", "chosen": "Yes.", "rejected": "No."}, "'context'|begin alike"),
        ({"dialogue": [user("Hi?")], **ANSWERS}, "is it 'dialogue'"),
        ({"history": "A post.", "instruction": "Hi?", **TEXTS}, "'history' must hold a list of pairs"),
        ({"chosen": str(GOOD)[:-4], "rejected": "No.", "prompt": "Hi?"}, "'chosen' must hold the JSON"),
    ],
)  # fmt: skip
def test_context_that_cannot_be_placed_is_refused(row, says):
    with pytest.raises(RowError, match=says):
        Pairs()(row)


def test_rankings_and_labels_take_whole_conversations_too():
    assert read({"prompt": "Hi?", "answers": [GOOD, BAD]}, Ranking) == ONE
    one = Labelled()({"prompt": "Hi?", "completion": GOOD, "label": True})
    assert one.answers == (Conversation((Message("user", "Hi?"), Message("assistant", "Yes.")), given=1),)
    assert read({"messages": LONGER["chosen"], "label": False}, Labelled) == (SECOND[0], SECOND[1][:1])
    assert read({"question": "Hi?", "history": [["A", "B"]], "completion": "Yes.", "label": 1}, Labelled)[0] == chat(
        "A", "B", "Hi?"
    )


SOME = [
    {"prompt": "Hi?", **TEXTS},
    {"prompt": "Ho?", "system": RULE, **TEXTS},
    {"prompt": "Ha?", "system": " ", **TEXTS},
]


@pytest.mark.parametrize("answers", [True, False])
def test_a_file_with_system_turns_in_some_rows_is_read_in_one_way(tmp_path, answers):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SOME))
    source = Source(str(path), Pairs(), answers=answers)
    records = [source.record(row) for row in range(3)]
    turns = [record.answers[0].messages if answers else record.messages for record in records]
    assert [[message.role for message in one][:2] for one in turns] == [
        ["user", "assistant"][: 1 + answers], ["system", "user"], ["user", "assistant"][: 1 + answers]
    ]  # fmt: skip


def test_rows_without_a_system_turn_beside_others_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "rejected": f"No {i}."}) + "\n" for i, row in enumerate(SOME)))
    for system, expected in ((None, 2), ("Be brief.", 0)):
        data = PreferenceData(train=str(path), system=system, cache=False)
        data.use_tokenizer(tiny_tokenizer())
        data.load_train()
        assert data.statistics[0].noted.get("without a system turn, which others have", 0) == expected


def test_prompts_for_rewards_have_their_system_turn(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({k: row[k] for k in row if k in ("prompt", "system")}) + "\n" for row in SOME))
    data = PromptData(train=str(path))
    data.use_tokenizer(tiny_tokenizer())
    data.load_train()
    assert [[message.role for message in row.messages] for row in data.rows["train"]] == [
        ["user"], ["system", "user"], ["user"]
    ]  # fmt: skip
    assert [row.columns["system"] for row in data.rows["train"]] == [None, RULE, " "]
    assert all(row.plain is None for row in data.rows["train"])
