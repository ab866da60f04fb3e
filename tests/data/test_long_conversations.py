"""Conversations of many answers: their cost, and that it buys nothing away."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import Example
from ftlit.data.formats import Conversation, Message
from ftlit.data.prefixes import Prefixes
from ftlit.data.templating import ChatTemplate
from ftlit.testing import tiny_tokenizer
from ftlit.testing.tiny import CHAT_TEMPLATE
from tests.data.test_templating import REASONING, newline_merging_tokenizer, sentencepiece_like_tokenizer

END = "<|im_end|>"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# Looks at the first turn, cuts white space, and takes a system turn out of the loop, as Llama 3's template does.
TRIMS = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] | trim %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{{ '<|im_start|>system\n' + s + '<|im_end|>\n' }}"
    "{% for m in rest %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    + PROMPT
)
# Looks at the turns before and after a tool's answer, as Qwen 2.5's template does.
LOOKS_AROUND = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}"
    "{% endif %}{{ '\n[' + m.content + ']' }}{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}" + PROMPT
)
# Remembers what it has seen, and says so at the end.
REMEMBERS = (
    "{% set ns = namespace(tools=0) %}{% for m in messages %}{% if m.role == 'tool' %}{% set ns.tools = ns.tools + 1 %}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and ns.tools %}{{ '!' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if ns.tools %}{{ '!' }}{% endif %}{% endif %}"
)
# The same, but what it remembers stays in the loop.
COUNTS = REMEMBERS.replace("{% if ns.tools %}{{ '!' }}{% endif %}{% endif %}", "{% endif %}").replace(
    "{% if m.role == 'assistant' and ns.tools %}{{ '!' }}{% endif %}", "{{ ns.tools if m.role == 'tool' else '' }}"
)
# Goes through all turns before it writes the first, as DeepSeek's template does.
TWICE = (
    "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.s = ns.s + m.content %}"
    "{% endif %}{% endfor %}{{ ns.s }}{% for m in messages if m.role != 'system' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
# Writes an end only where an answer is to follow no more, as Phi 3's template does.
CLOSES = CHAT_TEMPLATE.replace("{% endif %}", "{% else %}{{ '<|endoftext|>' }}{% endif %}")
BUFFERED = "{% set all %}" + CHAT_TEMPLATE.replace(PROMPT, "") + "{% endset %}{{ all | trim + '\n' }}" + PROMPT
NUMBERS = "{% for m in messages %}{{ loop.index ~ '/' ~ messages | length }}" + CHAT_TEMPLATE.split("%}", 1)[1].replace(
    "message[", "m["
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}" + PROMPT
)
TEMPLATES = {
    name: tiny_tokenizer(template)
    for name, template in {
        "plain": CHAT_TEMPLATE, "trims": TRIMS, "looks around": LOOKS_AROUND, "remembers": REMEMBERS,
        "counts": COUNTS, "twice": TWICE, "closes": CLOSES, "buffered": BUFFERED, "numbers": NUMBERS,
        "reasoning": REASONING, "marked": MARKED,
    }.items()
}  # fmt: skip
TOKENIZERS = {
    **{name: tokenizer for name, tokenizer in TEMPLATES.items() if name != "numbers"},  # which has no fixed prompt
    "merging": newline_merging_tokenizer(),
    **{f"space {way}": sentencepiece_like_tokenizer(way) for way in ("always", "first", "never")},
}

WORD = st.lists(st.sampled_from([*"ab \n", "\n\n", "<|im_end|>", "aa"]), min_size=1, max_size=4).map("".join)
WORD = WORD.filter(str.strip)
TURN = st.tuples(st.sampled_from(["user", "user", "tool", "system"]), WORD)
ROUND = st.tuples(st.lists(TURN, max_size=2), WORD, st.sampled_from([1.0, 1.0, 0.0]))


def conversation_of(rounds):
    turns = [Message("user", "a")]
    for between, answer, weight in rounds:
        turns += [Message(role, content) for role, content in between]
        turns.append(Message("assistant", answer, weight))
    return Conversation(tuple(turns))


def one_by_one(tokenizer, conversation):
    """The examples by definition: each answer rendered and tokenized from the first turn on."""

    def text(messages, prompt):
        turns = [message.turn() for message in messages]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)

    def ids(words):
        return tokenizer(words, add_special_tokens=False)["input_ids"]

    template = ChatTemplate(tokenizer)
    each = []
    for number, message in enumerate(conversation.messages):
        if message.role != "assistant" or not message.weight:
            continue
        prompt, whole = text(conversation.messages[:number], True), text(conversation.messages[: number + 1], False)
        before, after = ids(prompt), ids(whole)
        if after[: len(before)] == before:
            own = after[len(before) :]
        else:
            own, _ = template._apart(before, whole[len(prompt) :], after)
        own = own[: max(place + 1 for place, token in enumerate(own) if token in template._special)]
        each.append((before, own))
    together, weights = [], []
    for before, own in each:
        if before[: len(together)] != together:
            break
        weights += [0.0] * (len(before) - len(together)) + [1.0] * len(own)
        together = before + own
    else:
        return [Example(together, weights)] if each else []
    return [Example(before + own, [0.0] * len(before) + [1.0] * len(own)) for before, own in each]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(rounds=st.lists(ROUND, min_size=1, max_size=5))
def test_what_is_saved_changes_no_token(name, rounds):
    conversation = conversation_of(rounds)
    assert ChatTemplate(TOKENIZERS[name]).encode(conversation) == one_by_one(TOKENIZERS[name], conversation)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(rounds=st.lists(ROUND, min_size=1, max_size=5))
def test_every_beginning_is_what_the_template_makes_of_it_alone(name, rounds):
    messages = conversation_of(rounds).messages
    render = ChatTemplate(TEMPLATES[name]).renderer
    prefixes = Prefixes(render, messages, None, None)
    for length in range(1, len(messages) + 1):
        assert prefixes.prompt(length) == render(messages[:length], prompt=True)
        assert prefixes.closed(length) == render.marked(messages[:length])


def long(answers):
    return conversation_of([([("user", f"q{number}")], f"answer {number}", 1.0) for number in range(answers)])


@pytest.mark.parametrize("name", ["plain", "trims", "looks around", "counts", "marked"])
def test_a_template_that_never_rewrites_is_rendered_a_few_times(name):
    """Twice for prompts and twice for answers, with texts and with marks for them; however many answers there are."""
    template = ChatTemplate(TEMPLATES[name])
    conversation = long(60)
    template.encode(conversation)
    first, template.renderer.renders = template.renderer.renders, 0
    (example,) = template.encode(conversation)
    assert first <= 12
    assert template.renderer.renders == 4
    assert sum(map(bool, example.weights)) == sum(len(f"answer {number}") + 1 for number in range(60))


@pytest.mark.parametrize("name", ["plain", "trims", "remembers", "twice", "marked"])
def test_what_is_tokenized_grows_with_the_text(name):
    """Each turn about twice, once as a prompt and once with its answer; not once for every answer that follows."""
    template = ChatTemplate(TEMPLATES[name])
    conversation = long(60)
    (example,) = template.encode(conversation)
    text = template.render(conversation.messages)
    assert template.characters < 3 * len(text)
    assert template.tokenizer.decode(example.input_ids) == text.rstrip("\n")


def test_where_only_a_tools_answer_looks_ahead_only_what_follows_it_is_rendered_anew():
    template = ChatTemplate(TEMPLATES["looks around"])
    rounds = [([("user", "q")], "a", 1.0)] * 20 + [([("tool", "t")], "a", 1.0)] * 2
    template.encode(conversation_of(rounds))
    template.renderer.renders = 0
    template.encode(conversation_of(rounds))
    assert template.renderer.renders == 4 + 2
