"""Which tokens are trained: the choice of turns, weights, marks of the template, text without a template."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from ftlit.batch import Example
from ftlit.data.formats import Completion, Conversation, Message, Text
from ftlit.data.plain import PLAIN, opening_tokens
from ftlit.data.templating import ChatTemplate, mark
from ftlit.errors import ConfigError, DataError
from ftlit.testing import tiny_tokenizer
from ftlit.testing.tiny import CHAT_TEMPLATE, TOOLS_TEMPLATE

HEAD, END = "<|im_start|>", "<|im_end|>"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
DROPS_EARLIER = CHAT_TEMPLATE.replace(
    "message['content']",
    "(message['content'] if loop.last else message['content'].split('</think>')[-1])",
)


def marked_template(body, header="'<|im_start|>' + m['role'] + '\n'"):
    return (
        "{% for m in messages %}{{ " + header + " }}"
        "{% if m['role'] == 'assistant' %}" + body + "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}" + PROMPT
    )


def chat(*turns, **more):
    return Conversation(tuple(Message(*turn) for turn in turns), **more)


TWO = chat(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))


def shown(record, template=CHAT_TEMPLATE, train_on="assistant"):
    tokenizer = tiny_tokenizer(template)
    made = ChatTemplate(tokenizer, train_on=train_on).encode(record)
    return [mark(tokenizer, example, "[", "]").replace(HEAD, "<").replace(END, ">") for example in made]


def with_begin(tokenizer):
    """The same tokenizer, putting its begin token before every text."""
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{HEAD} $A", pair=f"{HEAD} $A $B", special_tokens=[(HEAD, tokenizer.bos_token_id)]
    )
    return tokenizer


def test_last_trains_the_last_answer_on_the_whole_conversation():
    assert shown(TWO, train_on="last") == ["<user\nq1>\n<assistant\na1>\n<user\nq2>\n<assistant\n[a2>]"]
    dropped = chat(("user", "q"), ("assistant", "<think>x</think>a"), ("user", "r"), ("assistant", "b"))
    assert shown(dropped, DROPS_EARLIER, "last") == ["<user\nq>\n<assistant\na>\n<user\nr>\n<assistant\n[b>]"]


def test_all_trains_every_token_but_the_first():
    assert shown(TWO, train_on="all") == ["<[user\nq1>\n<assistant\na1>\n<user\nq2>\n<assistant\na2>\n]"]


def test_weights_of_messages():
    weighed = chat(("user", "q1"), ("assistant", "a1", 0.0), ("user", "q2"), ("assistant", "a2", 0.5))
    assert shown(weighed) == ["<user\nq1>\n<assistant\na1>\n<user\nq2>\n<assistant\n[a2>]"]
    (example,) = ChatTemplate(tiny_tokenizer()).encode(weighed._replace(weight=3.0))
    assert set(example.weights) == {0.0, 1.5}
    assert shown(weighed, train_on="all") == ["<[user\nq1>\n<assistant\n]a1>[\n<user\nq2>\n<assistant\na2>]"]
    (example,) = ChatTemplate(tiny_tokenizer(), train_on="all").encode(weighed)
    assert sorted(set(example.weights)) == [0.0, 0.5, 1.0]
    assert example.weights[-3:] == [0.5] * 3


def test_an_untrained_answer_need_not_be_exact():
    """With the first answer untrained, nothing needs to be split although the template rewrites it."""
    turns = chat(("user", "q"), ("assistant", "<think>x</think>a", 0.0), ("user", "r"), ("assistant", "b"))
    assert len(shown(turns, DROPS_EARLIER)) == 1
    assert len(shown(chat(*((m.role, m.content) for m in turns.messages)), DROPS_EARLIER)) == 2


@pytest.mark.parametrize(
    "record",
    [
        TWO._replace(weight=0.0),
        chat(("user", "q"), ("assistant", "a", 0.0)),
        TWO._replace(given=4),
        Text("a", 0.0),
        Completion("a", "b", 0.0),
    ],
)
def test_what_weighs_nothing_gives_no_example(record):
    assert shown(record) == []


def test_given_messages_are_not_trained():
    assert shown(TWO._replace(given=3)) == ["<user\nq1>\n<assistant\na1>\n<user\nq2>\n<assistant\n[a2>]"]


def test_weights_of_other_turns_cannot_be_had_with_all():
    with pytest.raises(DataError, match="only assistant turns can have a weight"):
        shown(chat(("user", "q", 0.0), ("assistant", "a")), train_on="all")


def test_weights_where_the_template_rewrites_cannot_be_had_with_all():
    turns = chat(("user", "q"), ("assistant", "<think>x</think>a", 0.5), ("user", "r"), ("assistant", "b"))
    with pytest.raises(DataError, match="rewrites earlier turns"):
        shown(turns, DROPS_EARLIER, "all")


# ---- marks of the template ------------------------------------------------------------------------------------------

WHOLE = "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
TEXT = st.text(st.sampled_from("ab \né😀<"), min_size=1, max_size=6).filter(str.strip)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_marks_of_the_whole_answer_agree_with_no_marks_and_with_transformers(rounds):
    turns = [turn for q, a in rounds for turn in (("user", q), ("assistant", a))]
    tokenizer = tiny_tokenizer(marked_template(WHOLE))
    (ours,) = ChatTemplate(tokenizer).encode(chat(*turns))
    (plain,) = ChatTemplate(tiny_tokenizer()).encode(chat(*turns))
    assert ours == plain
    theirs = tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in turns], return_dict=True, return_assistant_tokens_mask=True
    )
    assert theirs["input_ids"] == [*ours.input_ids, tokenizer("\n")["input_ids"][0]]
    assert theirs["assistant_masks"] == [*(int(w) for w in ours.weights), 0]


def test_marks_can_narrow_an_answer():
    body = (
        "{% set parts = m['content'].split('|') %}{{ parts[0] }}"
        "{% generation %}{{ parts[1] + '<|im_end|>' }}{% endgeneration %}"
    )
    assert shown(chat(("user", "q"), ("assistant", "x|a")), marked_template(body)) == ["<user\nq>\n<assistant\nx[a>]"]


def test_marks_can_leave_an_answer_out():
    body = "{% if loop.last %}" + WHOLE + "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    # As the last of its own prompt each answer is marked: the marks hold for the conversation up to the answer.
    assert len(shown(TWO, marked_template(body))) == 1
    none = "{% if false %}" + WHOLE + "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    assert shown(TWO, marked_template(none)) == []


def test_marks_over_the_header_train_nothing_that_generation_is_fed():
    body = "{% generation %}{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>' }}{% endgeneration %}"
    header = "'' if m['role'] == 'assistant' else '<|im_start|>' + m['role'] + '\n'"
    assert shown(TWO, marked_template(body, header)) == shown(TWO)


@pytest.mark.parametrize(
    ("body", "header", "text"),
    [
        (
            "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
            "'<|im_start|>' + m['role'] + '\n'",
            "leave the end token of an answer out",
        ),
        (
            "{{ m['content'] + '<|im_' }}{% generation %}{{ 'end|>' }}{% endgeneration %}",
            "'<|im_start|>' + m['role'] + '\n'",
            "cut through a token",
        ),
    ],
    ids=["end", "token"],
)
def test_marks_that_cannot_be_exact_are_refused(body, header, text):
    with pytest.raises(DataError, match=text):
        shown(chat(("user", "q"), ("assistant", "a")), marked_template(body, header))


# ---- tools ----------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALLED = Conversation(
    (
        Message("user", "1+2?"),
        Message("assistant", "", 1.0, {"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}),
        Message("tool", "3"),
        Message("assistant", "Three."),
    ),
    (TOOL,),
)


def test_tools_and_calls_are_handed_to_the_template():
    (text,) = shown(CALLED, TOOLS_TEMPLATE)
    assert text.startswith('<tools\n[{"type": "function", "function": {"name": "add", "parameters": {}}}]>\n<user')
    assert '<assistant\n[[{"function": {"name": "add", "arguments": {"a": 1}}}]>]' in text
    assert text.endswith("<tool\n3>\n<assistant\n[Three.>]")


def test_tools_and_calls_that_the_template_does_not_show_are_refused():
    with pytest.raises(DataError, match=r"does not show the tool 'add'; .*data.columns: \{tools: null\}"):
        shown(CALLED)
    with pytest.raises(DataError, match="does not show the call of 'add'"):
        shown(CALLED._replace(tools=None))


# ---- the plain template ---------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_template_gets_the_plain_one():
    tokenizer = tiny_tokenizer(None)
    template = ChatTemplate(tokenizer)
    assert template.is_assumed
    assert tokenizer.chat_template == PLAIN
    (example,) = template.encode(chat(("system", "s"), *((m.role, m.content) for m in TWO.messages)))
    assert mark(tokenizer, example, "[", "]") == (
        "s\n\n### User:\nq1\n\n### Assistant:\n[a1<|im_end|>]\n\n### User:\nq2\n\n### Assistant:\n[a2<|im_end|>]"
    )
    assert template.end_tokens() == [tokenizer.eos_token_id]
    assert not ChatTemplate(tokenizer).is_assumed


def test_the_plain_template_can_be_chosen():
    tokenizer = tiny_tokenizer()
    template = ChatTemplate(tokenizer, "plain")
    assert not template.is_assumed
    assert tokenizer.chat_template == PLAIN


def test_the_plain_template_begins_as_the_tokenizer_does():
    tokenizer = with_begin(tiny_tokenizer(None))
    assert opening_tokens(tokenizer) == [tokenizer.bos_token_id]
    (example,) = ChatTemplate(tokenizer).encode(chat(("user", "q"), ("assistant", "a")))
    assert tokenizer.decode(example.input_ids).startswith("<|im_start|>### User:\nq")
    assert example.input_ids.count(tokenizer.bos_token_id) == 1


def test_without_an_end_token_there_is_no_plain_template():
    tokenizer = tiny_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a chat template nor an end token"):
        ChatTemplate(tokenizer)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no end token"):
        ChatTemplate(tokenizer).encode(Text("a"))


# ---- text without a template ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [False, True])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(prompt=TEXT, completion=TEXT)
def test_a_completion_goes_on_from_its_prompt_and_ends(begin, prompt, completion):
    tokenizer = with_begin(tiny_tokenizer()) if begin else tiny_tokenizer()
    template = ChatTemplate(tokenizer)
    (example,) = template.encode(Completion(prompt, completion))
    before = tokenizer(prompt)["input_ids"]
    assert example.input_ids == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
    assert example.weights == [0.0] * len(before) + [1.0] * (len(example.input_ids) - len(before))
    assert template.prompt_of(Completion(prompt, "")) == before
    (whole,) = ChatTemplate(tokenizer, train_on="all").encode(Completion(prompt, completion))
    assert whole == Example(example.input_ids, [0.0] + [1.0] * (len(example.input_ids) - 1))


@pytest.mark.parametrize("begin", [False, True])
def test_a_document_is_trained_but_for_its_first_token(begin):
    tokenizer = with_begin(tiny_tokenizer()) if begin else tiny_tokenizer()
    (example,) = ChatTemplate(tokenizer).encode(Text("abc", 0.5))
    assert example.input_ids == [*tokenizer("abc")["input_ids"], tokenizer.eos_token_id]
    assert example.weights == [0.0] + [0.5] * (len(example.input_ids) - 1)


def test_an_end_token_that_is_there_is_not_doubled():
    tokenizer = tiny_tokenizer()
    template = ChatTemplate(tokenizer)
    for record in (Text("abc<|im_end|>"), Completion("abc", "d<|im_end|>")):
        (example,) = template.encode(record)
        assert example.input_ids.count(tokenizer.eos_token_id) == 1
