"""What a row says shows in what is rendered, or is an error: fields, calls, thoughts, tools, in many templates."""

import pytest

from ftlit.data.formats import Conversation, Message
from ftlit.data.templating import ChatTemplate, mark
from ftlit.errors import DataError
from ftlit.testing import tiny_tokenizer
from ftlit.testing.tiny import CHAT_TEMPLATE, TOOLS_TEMPLATE

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def templated(content, before="", head="'<|im_start|>' + m.role + '\n'"):
    """A template of turns whose content is shown by an expression."""
    return before + "{% for m in messages %}{{ " + head + " }}" + content + "{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT


CALLS = "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + CUT + '</call>' }}{% endfor %}"
OBJECTS = templated("{{ m.content }}" + CALLS.replace("CUT", "c.function.arguments | tojson"))
# Concatenates arguments, as DeepSeek's template does.
STRINGS = templated("{{ m.content }}" + CALLS.replace("CUT", "c.function.arguments"))
# Writes an object as Python does.
PYTHON = templated("{{ m.content }}" + CALLS.replace("CUT", "c.function.arguments | string"))
# Shows calls only where there is no content at all, with their type.
NO_CONTENT = templated(
    "{% if m.content is none %}{% for c in m.tool_calls %}{{ c.type + ':' + c.function.name + c.function.arguments }}"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}"
)
FIRST_CALL = templated("{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}")
CALL_OR_CONTENT = templated("{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}")
NAMES_ONLY = templated("{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}")
FOLLOWS_THOUGHT = templated(
    "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content }}"
)
DELETES_THOUGHT = templated("{{ m.content.split('</think>')[-1] }}")
LAST_SYSTEM = (
    "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.s = m.content %}"
    "{% endif %}{% endfor %}{{ ns.s }}"
    + templated("{{ m.content }}").replace("in messages %}", "in messages if m.role != 'system' %}")
)
NO_TOOLS_ANSWER = templated("{{ m.content }}").replace("in messages %}", "in messages if m.role != 'tool' %}")
TOJSON = templated("{{ m.content | tojson if m.role == 'tool' else m.content | trim }}")
ESCAPES = templated("{{ m.content | replace('<', '&lt;') | replace('&lt;|', '<|') }}")
LIST_OF_PARTS = templated("{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}")
SWITCHES = templated("{{ m.content.replace('/no_think', '').rstrip() if m.role == 'system' else m.content }}")
SORTS = templated("{{ m.content }}{{ m.tool_calls | tojson(sort_keys=true) if m.tool_calls else '' }}")


def call(name="add", arguments=None):
    return {"id": "c1", "function": {"name": name, "arguments": {"a": "one"} if arguments is None else arguments}}


def said(role, content, **more):
    return Message(role, content, 1.0, more or None)


def row(*messages, tools=None):
    return Conversation(tuple(messages), tools)


ASK = said("user", "1+2?")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def shown(template, record):
    tokenizer = tiny_tokenizer(template)
    made = ChatTemplate(tokenizer).encode(record)
    return [
        mark(tokenizer, one, "[", "]").replace("<|im_start|>assistant\n", "A:").replace("<|im_end|>", ".")
        for one in made
    ]


LOST = {
    "reasoning": (CHAT_TEMPLATE, row(ASK, said("assistant", "3", reasoning_content="one and two")),
                  "turn 2 (assistant): the chat template does not show its reasoning_content ('one and two')"),
    "reasoning that is also the answer": (CHAT_TEMPLATE, row(ASK, said("assistant", "3", thinking="3")),
                                          "does not show its thinking ('3')"),
    "thought in content": (DELETES_THOUGHT, row(ASK, said("assistant", "<think>one and two</think>3")),
                           "does not show what is thought in it ('one and two')"),
    "thought that is also the answer": (DELETES_THOUGHT, row(ASK, said("assistant", "<think>3</think>3")),
                                        "does not show what is thought in it ('3')"),
    "second of two calls": (FIRST_CALL, row(ASK, said("assistant", "", tool_calls=[call("add"), call("sub")])),
                            "does not show the call of 'sub'"),
    "second of two like calls": (FIRST_CALL, row(ASK, said("assistant", "", tool_calls=[call(), call()])),
                                 "does not show the call of 'add'"),
    "arguments": (NAMES_ONLY, row(ASK, said("assistant", "one", tool_calls=[call()])),
                  "does not show what a call is given ('a')"),
    "text beside a call": (CALL_OR_CONTENT, row(ASK, said("assistant", "I add.", tool_calls=[call()])),
                           "turn 2 (assistant): the chat template does not show its content ('I add.')"),
    "text beside an old call": (CALL_OR_CONTENT,
                                row(ASK, said("assistant", "I add.", function_call=call()["function"])),
                                "does not show its content ('I add.')"),
    "old call": (CHAT_TEMPLATE, row(ASK, said("assistant", "add", function_call=call()["function"])),
                 "does not show the call of 'add'"),
    "text beside an untrained call": (
        CALL_OR_CONTENT, row(ASK, said("assistant", "I add.", tool_calls=[call()])._replace(weight=0.0),
                             said("tool", "3"), said("assistant", "Three.")),
        "turn 2 (assistant): the chat template does not show its content ('I add.')"),
    "tool's answer": (NO_TOOLS_ANSWER, row(ASK, said("tool", "3"), said("assistant", "3")),
                      "turn 2 (tool): the chat template does not show the tool's answer ('3')"),
    "first of two system turns": (LAST_SYSTEM, row(said("system", "Be."), said("system", "Be nice."), ASK,
                                                   said("assistant", "3")),
                                  "turn 1 (system): the chat template does not show this system turn ('Be.')"),
    "tool in the question": (CHAT_TEMPLATE, row(said("user", "Please add"), said("assistant", "3"), tools=(TOOL,)),
                             "the chat template does not show the tool 'add'"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_what_would_be_lost_is_named(name):
    template, record, sentence = LOST[name]
    with pytest.raises(DataError) as error:
        shown(template, record)
    assert sentence in str(error.value)
    assert "; give a data.chat_template that" in str(error.value)
    assert ", or leave " in str(error.value)


NICE = said("user", "Line\nbreak \"quote\" <b> ünïcode \\n {'a'}")
FINE = {
    "JSON": (TOJSON, row(ASK, said("tool", NICE.content), said("assistant", "3")), "A:[3.]"),
    "trimmed": (TOJSON, row(said("user", "  a\n"), said("assistant", "\n 3 \n")), "A:[3.]"),
    "markup": (ESCAPES, row(NICE, said("assistant", "<b>")), "A:[&lt;b>.]"),
    "parts": (LIST_OF_PARTS, row(said("system", "Be."), ASK, said("assistant", "3")), "A:[3.]"),
    "switch": (SWITCHES, row(said("system", "Be nice. /no_think"), ASK, said("assistant", "3")), "A:[3.]"),
    "sorted keys": (SORTS, row(ASK, said("assistant", "", tool_calls=[call(arguments={"b": "x", "a": ["y", 1]})])),
                    '[[{"function": {"arguments": {"a": ["y", 1], "b": "x"}, "name": "add"}, "id": "c1"}].]'),
    "tools": (TOOLS_TEMPLATE, row(ASK, said("assistant", "3"), tools=(TOOL,)), "A:[3.]"),
    "text beside a call": (OBJECTS, row(ASK, said("assistant", "I add.", tool_calls=[call()])),
                           'A:[I add.<call>add {"a": "one"}</call>.]'),
    "nothing but a call": (OBJECTS, row(ASK, said("assistant", "", function_call=call()["function"])),
                           'A:[<call>add {"a": "one"}</call>.]'),
    "reasoning": (FOLLOWS_THOUGHT, row(ASK, said("assistant", "3", reasoning="one and two")),
                  "A:[<think>one and two</think>3.]"),
    "empty texts": (CHAT_TEMPLATE, row(said("system", ""), ASK, said("assistant", "3", reasoning_content=" ")),
                    "A:[3.]"),
}  # fmt: skip


@pytest.mark.parametrize("name", FINE)
def test_what_shows_in_another_way_is_fine(name):
    template, record, end = FINE[name]
    assert shown(template, record)[-1].endswith(end)


def test_what_earlier_answers_thought_may_go():
    thinks = said("assistant", "3", reasoning_content="one and two")
    first, second = shown(FOLLOWS_THOUGHT, row(ASK, thinks, said("user", "Sure?"), said("assistant", "Yes.")))
    assert first.endswith("A:[<think>one and two</think>3.]")
    assert "A:3.\n" in second
    assert second.endswith("A:[Yes..]")


def test_prompts_are_checked_as_rows_are():
    template = ChatTemplate(tiny_tokenizer())
    thinks = said("assistant", "<think>a</think>b")
    assert template.prompt_ids((ASK, thinks, ASK))
    with pytest.raises(DataError, match="does not show the tool 'add'"):
        template.prompt_ids((ASK,), (TOOL,))
    cuts = ChatTemplate(tiny_tokenizer(templated("{{ m.content[:12] }}")))
    long = said("user", "How much is 1+2?")
    with pytest.raises(DataError, match=r"turn 1 \(user\).*its content \('How much is 1\+2\?'\)"):
        cuts.prompt_ids((long,))
    assert cuts.prompt_ids((long,), texts=False)
    cuts = ChatTemplate(tiny_tokenizer(templated("{{ m.content[:3] }}")))
    with pytest.raises(DataError, match=r"turn 1 \(user\).*its content \('1\+2\?'\)"):
        cuts.prompt_ids((ASK,), texts=False)
    with pytest.raises(DataError, match="reasoning_content"):
        template.render((ASK, said("assistant", "3", reasoning_content="x")))


@pytest.mark.parametrize("arguments", [{"city": "Öl"}, '{"city": "Öl"}'])
@pytest.mark.parametrize("template", [STRINGS, PYTHON])
def test_a_template_that_wants_arguments_as_text_gets_them_so(template, arguments):
    (text,) = shown(template, row(ASK, said("assistant", "", tool_calls=[call("w", arguments)])))
    assert text.endswith('A:[<call>w {"city": "Öl"}</call>.]')


def test_a_template_that_shows_calls_only_without_content_gets_none():
    (text,) = shown(NO_CONTENT, row(ASK, said("assistant", "", tool_calls=[call("w", {"city": "Öl"})])))
    assert text.endswith('A:[function:w{"city": "Öl"}.]')
    with pytest.raises(DataError, match="does not show the call of 'w'"):
        shown(NO_CONTENT, row(ASK, said("assistant", "I look.", tool_calls=[call("w")])))


def test_a_shape_is_asked_once():
    template = ChatTemplate(tiny_tokenizer(OBJECTS))
    template.encode(row(ASK, said("assistant", "", tool_calls=[call()])))
    template.renderer.renders = 0
    for number in range(10):
        template.encode(row(said("user", f"{number}?"), said("assistant", "", tool_calls=[call(f"f{number}")])))
    assert template.renderer.renders == 20  # a prompt and an answer each
