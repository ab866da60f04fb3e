"""Variables of templates, open thoughts, and answers that the next turn ends."""

import json

import pytest

from ftlit.data.datamodules import SFTData
from ftlit.data.formats import Conversation, Message
from ftlit.data.prompts import PromptData
from ftlit.data.templating import ChatTemplate, mark
from ftlit.errors import ConfigError, DataError
from ftlit.testing import tiny_tokenizer
from ftlit.testing.tiny import CHAT_TEMPLATE

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + PREFILL }}{% endif %}"
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}BODY{{ '<|im_end|>\n' }}{% endfor %}"
# Shows what was thought last, an empty thought where nothing was, and opens none, as Qwen 3's template does.
BLOCK = (
    "{% set t = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + t.strip() + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}"
)
SWITCHED = TURNS.replace("BODY", BLOCK) + PROMPT.replace(
    "PREFILL", "('<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '')"
)
# Opens a thought for generation and shows none in answers, as DeepSeek R1's template does.
OPENS = TURNS.replace("BODY", "{{ m.content.split('</think>')[-1] }}") + PROMPT.replace("PREFILL", "'<think>\n'")
OPENS_MARKED = OPENS.replace(
    "{{ m.content.split('</think>')[-1] }}{{ '<|im_end|>\n' }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>\n' }}{% endif %}",
)
CLOSES = CHAT_TEMPLATE.replace("assistant\n'", "assistant\n<think>\n\n</think>\n\n'")
# Ends no answer: the token of the next turn does, as in GLM 4.5's template.
OPEN_ENDED = (
    "{% for m in messages %}{{ ('<|endoftext|>' if m.role == 'assistant' else '<|im_end|>') + '\n' + m.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
)


def chat(*turns, **more):
    return Conversation(tuple(Message(*turn) for turn in turns), **more)


def shown(template, record, options=None):
    tokenizer = tiny_tokenizer(template)
    made = ChatTemplate(tokenizer, options=options)
    examples = made.encode(record)
    for example in examples:  # what generation is fed
        last = max(i for i, m in enumerate(record.messages) if m.role == "assistant")
        if example is examples[-1]:
            prompt = made.prompt_ids(record.messages[:last], record.tools, record.template_kwargs)
            assert example.input_ids[: len(prompt)] == prompt
            assert not any(example.weights[len(prompt) - 1 : len(prompt)])
    return [
        mark(tokenizer, one, "[", "]").replace("<|im_start|>assistant\n", "A:").replace("<|im_end|>", ".")
        for one in examples
    ]


ASK = ("user", "q")
PLAIN = chat(ASK, ("assistant", "4"))
THOUGHT = chat(ASK, ("assistant", "<think>\nhm\n</think>\n\n4"))
BESIDE = chat(ASK, ("assistant", "4", 1.0, {"reasoning_content": "hm"}))
OFF = {"enable_thinking": False}


@pytest.mark.parametrize(
    ("template", "record", "end"),
    [
        (OPENS, PLAIN, "A:<think>\n[\n</think>\n\n4.]"),
        (OPENS, THOUGHT, "A:<think>\n[hm\n</think>\n\n4.]"),
        (OPENS, BESIDE, "A:<think>\n[hm\n</think>\n\n4.]"),
        (OPENS, chat(ASK, ("assistant", "<think>hm</think>4")), "A:<think>\n[hm\n</think>4.]"),
        (OPENS_MARKED, PLAIN, "A:<think>\n[\n</think>\n\n4.]"),
        (OPENS_MARKED, THOUGHT, "A:<think>\n[hm\n</think>\n\n4.]"),
        (OPENS_MARKED, BESIDE, "A:<think>\n[hm\n</think>\n\n4.]"),
        (OPENS.replace("<think>", "[THINK]"), PLAIN, "A:[THINK]\n[\n[/THINK]\n\n4.]"),
        (CLOSES, PLAIN, "A:<think>\n\n</think>\n\n[4.]"),
    ],
)
def test_an_answer_goes_on_from_an_open_thought(template, record, end):
    (text,) = shown(template, record)
    assert text.endswith(end)


def test_earlier_thoughts_go_and_each_answer_has_its_exact_prompt():
    first, second = shown(OPENS, chat(*THOUGHT.messages, ASK, *BESIDE.messages[1:]))
    assert first.endswith("A:<think>\n[hm\n</think>\n\n4.]")
    assert second.endswith("A:\n\n4.\n<|im_start|>user\nq.\nA:<think>\n[hm\n</think>\n\n4.]")


@pytest.mark.parametrize("record", [THOUGHT, BESIDE])
def test_a_thought_after_a_prompt_that_closes_it_is_refused(record):
    with pytest.raises(
        DataError, match="has a thought, but the chat template's generation prompt ends in an empty one"
    ):
        shown(CLOSES, record)


def test_marks_that_leave_a_part_of_an_opened_answer_out_are_refused():
    half = OPENS.replace("{{ m.content.split('</think>')[-1] }}", "x{% generation %}{{ m.content }}{% endgeneration %}")
    with pytest.raises(DataError, match="marks leave out a part of an answer"):
        shown(half, PLAIN)


def test_without_thinking_the_empty_thought_is_given():
    assert shown(SWITCHED, PLAIN)[0].endswith("A:[<think>\n\n</think>\n\n4.]")
    assert shown(SWITCHED, PLAIN, OFF)[0].endswith("A:<think>\n\n</think>\n\n[4.]")
    assert shown(SWITCHED, THOUGHT)[0].endswith("A:[<think>\nhm\n</think>\n\n4.]")
    with pytest.raises(DataError, match="has a thought"):
        shown(SWITCHED, THOUGHT, OFF)


def test_what_a_row_says_comes_first():
    assert shown(SWITCHED, PLAIN._replace(template_kwargs=OFF))[0].endswith("A:<think>\n\n</think>\n\n[4.]")
    on = PLAIN._replace(template_kwargs={"enable_thinking": True})
    assert shown(SWITCHED, on, OFF)[0].endswith("A:[<think>\n\n</think>\n\n4.]")


def test_an_answer_that_the_next_turn_ends():
    (text,) = shown(OPEN_ENDED, chat(ASK, ("assistant", "4"), ASK, ("assistant", "5")))
    assert text == ".\nq<|endoftext|>[\n4.]\nq<|endoftext|>[\n5.]"
    template = ChatTemplate(tiny_tokenizer(OPEN_ENDED))
    assert template.tokenizer.convert_ids_to_tokens(template.end_tokens()) == ["<|im_end|>"]


# ---- variables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, 3, 0.5, "a 'b' \"c\"\n{{ d }}", ["a", {"b": None}], {"a": [1, False]}])
def test_any_value_gets_to_the_template_as_it_is(value):
    template = "\n" + CHAT_TEMPLATE + "{{ x | tojson if x is defined }}"
    tokenizer = tiny_tokenizer(template)
    plain = ChatTemplate(tokenizer).renderer([Message(*ASK)])
    own = ChatTemplate(tokenizer).renderer([Message(*ASK)], options={"x": value})
    kept = ChatTemplate(tokenizer, options={"x": value}).renderer([Message(*ASK)])
    assert own == kept == plain + json.dumps(value, ensure_ascii=False)
    assert ChatTemplate(tokenizer, options={"x": value}).renderer([Message(*ASK)]) == kept
    assert ChatTemplate(tokenizer, options={"x": None}).renderer([Message(*ASK)]) == kept  # as it was left
    assert tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False) == kept


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"enable_thinkng": False}, "data.chat_template_kwargs: the chat template reads no 'enable_thinkng'"),
        ({"messages": []}, "data.chat_template_kwargs: 'messages' is not for setting"),
        ({"add_generation_prompt": True}, "is not for setting"),
        ({"no name": 1}, "is not for setting"),
    ],
)
def test_a_variable_that_there_is_not_is_refused(options, text):
    with pytest.raises(ConfigError) as error:
        ChatTemplate(tiny_tokenizer(SWITCHED), options=options)
    assert text in str(error.value)


def test_a_switch_of_a_row_that_the_template_does_not_have_does_nothing_but_a_text_is_not_lost():
    assert shown(CHAT_TEMPLATE, PLAIN._replace(template_kwargs=OFF)) == shown(CHAT_TEMPLATE, PLAIN)
    with pytest.raises(DataError, match=r"reads no 'persona'.*data.columns: \{chat_template_kwargs: null\}"):
        shown(CHAT_TEMPLATE, PLAIN._replace(template_kwargs={"persona": "a pirate"}))


def rows(tmp_path, *kwargs):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "4"}]
    lines = [{"messages": turns, "chat_template_kwargs": each} for each in kwargs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "rows.jsonl")


def test_rows_bring_their_own_and_prompts_follow(tmp_path):
    file = rows(tmp_path, OFF, json.dumps(OFF), {"enable_thinking": None}, None, "")
    data = SFTData(train=file, predict=file, cache=False, chat_template_kwargs={"enable_thinking": True})
    data.use_tokenizer(tiny_tokenizer(SWITCHED))
    data.setup("fit")
    assert ["</think>\n\n⟦" in data.rendered(number) for number in range(5)] == [True, True, False, False, False]
    data.setup("predict")
    closed = data.template.tokenizer("</think>\n\n")["input_ids"]
    assert [ids[-len(closed) :] == closed for _, ids in data.prompts] == [True, True, False, False, False]
    prompts = PromptData(train=file, chat_template_kwargs=OFF)
    prompts.use_tokenizer(tiny_tokenizer(SWITCHED))
    prompts.setup("fit")
    assert all(prompts.rendered(number).endswith("</think>\n\n") for number in range(5))


def test_a_column_that_holds_no_object_is_refused(tmp_path):
    data = SFTData(train=rows(tmp_path, [1]), cache=False)
    data.use_tokenizer(tiny_tokenizer(SWITCHED))
    with pytest.raises(DataError, match="row 1: column 'chat_template_kwargs' must hold an object such as"):
        data.setup("fit")


def test_the_cache_knows_them():
    signatures = {ChatTemplate(tiny_tokenizer(SWITCHED), options=own).signature() for own in (None, OFF, {})}
    assert len(signatures) == 2
