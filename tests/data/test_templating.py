import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ftlit.batch import Example
from ftlit.data.formats import Conversation, Message
from ftlit.data.templating import ChatTemplate, mark
from ftlit.errors import ConfigError, DataError
from ftlit.testing import tiny_tokenizer
from ftlit.testing.tiny import CHAT_TEMPLATE

END = "<|im_end|>"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# Shows the reasoning of the last assistant turn only, as Qwen3's template does.
REASONING = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}" + GENERATION
)
NO_END = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}" + GENERATION
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHAT_TEMPLATE
)
OTHER_PROMPT = CHAT_TEMPLATE.replace("'<|im_start|>assistant\n'", "'<|im_start|>bot\n'")


def chat(*turns):
    return Conversation(tuple(Message(*turn) for turn in turns))


ONE = chat(("user", "q"), ("assistant", "a"))
TWO = chat(("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))


def stretches(example):
    """(start, end) of every trained stretch."""
    edges = [0, *(1 if w else 0 for w in example.weights), 0]
    starts = [i for i in range(len(edges) - 1) if edges[i : i + 2] == [0, 1]]
    ends = [i for i in range(len(edges) - 1) if edges[i : i + 2] == [1, 0]]
    return list(zip(starts, ends, strict=True))


def trained(tokenizer, example):
    return [tokenizer.decode(example.input_ids[start:end]) for start, end in stretches(example)]


def newline_merging_tokenizer():
    """Byte-level, with one merge: two line breaks are one token, wherever they meet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token=END, pad_token=END)
    fast.chat_template = CHAT_TEMPLATE
    return fast


ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def sentencepiece_like_tokenizer(prepend):
    """Puts a space before a text, as the tokenizers of Llama 2, TinyLlama and Mistral 7B do."""
    letters = sorted("▁<|>\nabcdefghijklmnopqrstuvwxyz")
    specials = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: number for number, token in enumerate([*specials, *letters, "▁a"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = ZEPHYR
    return fast


def test_pad_token_is_the_end_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_one_answer_and_its_end_token_are_trained(tokenizer):
    (example,) = ChatTemplate(tokenizer).encode(ONE)
    assert tokenizer.decode(example.input_ids) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
    assert example.weights == [0.0] * 20 + [1.0] * 2
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert len(example.input_ids) == 22


def test_every_answer_is_trained_and_the_newline_after_it_is_not(tokenizer):
    (example,) = ChatTemplate(tokenizer).encode(TWO)
    assert mark(tokenizer, example) == (
        "<|im_start|>system\ns<|im_end|>\n"
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n⟦a1<|im_end|>⟧\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n⟦a2<|im_end|>⟧"
    )
    assert trained(tokenizer, example) == ["a1<|im_end|>", "a2<|im_end|>"]
    assert example.num_targets == 6


def test_prompt_of_every_answer_is_what_generation_is_fed(tokenizer):
    template = ChatTemplate(tokenizer)
    (example,) = template.encode(TWO)
    (first, _), (second, _) = stretches(example)
    assert example.input_ids[:first] == template.prompt_ids(TWO.messages[:2])
    assert example.input_ids[:second] == template.prompt_ids(TWO.messages[:4])
    assert tokenizer.decode(template.prompt_ids(TWO.messages[:2])).endswith("q1<|im_end|>\n<|im_start|>assistant\n")


def test_turns_after_the_last_answer_are_left_out(tokenizer):
    (example,) = ChatTemplate(tokenizer).encode(chat(*ONE.messages, ("user", "never answered")))
    assert tokenizer.decode(example.input_ids).endswith("assistant\na<|im_end|>")


def test_two_answers_in_a_row_are_both_trained(tokenizer):
    (example,) = ChatTemplate(tokenizer).encode(chat(("user", "q"), ("assistant", "a"), ("assistant", "b")))
    assert trained(tokenizer, example) == ["a<|im_end|>", "b<|im_end|>"]


def test_special_tokens_in_texts_do_not_move_the_end(tokenizer):
    (example,) = ChatTemplate(tokenizer).encode(
        chat(
            ("user", "what is <|im_end|>?"), ("assistant", "<|im_end|> ends a turn"), ("user", "q"), ("assistant", "a")
        )
    )
    assert trained(tokenizer, example) == ["<|im_end|> ends a turn<|im_end|>", "a<|im_end|>"]


def test_earlier_reasoning_that_is_dropped_gives_one_example_an_answer():
    tokenizer = tiny_tokenizer(REASONING)
    conversation = chat(
        ("user", "q1"), ("assistant", "<think>x</think>a1"), ("user", "q2"), ("assistant", "<think>y</think>a2")
    )
    first, second = ChatTemplate(tokenizer).encode(conversation)
    head = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    assert mark(tokenizer, first) == head + "⟦<think>x</think>a1<|im_end|>⟧"
    assert mark(tokenizer, second) == (
        head + "a1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n⟦<think>y</think>a2<|im_end|>⟧"
    )


def test_reasoning_template_without_earlier_reasoning_gives_one_example():
    tokenizer = tiny_tokenizer(REASONING)
    conversation = chat(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "<think>y</think>a2"))
    (example,) = ChatTemplate(tokenizer).encode(conversation)
    assert trained(tokenizer, example) == ["a1<|im_end|>", "<think>y</think>a2<|im_end|>"]


def test_answer_that_would_merge_with_the_prompt_keeps_the_prompt_exact():
    tokenizer = newline_merging_tokenizer()
    template = ChatTemplate(tokenizer)
    conversation = chat(("user", "q"), ("assistant", "\na"))
    (example,) = template.encode(conversation)
    prompt = template.prompt_ids(conversation.messages[:1])
    assert example.input_ids[: len(prompt)] == prompt
    assert trained(tokenizer, example) == ["\na<|im_end|>"]
    whole = tokenizer(template.render(conversation.messages), add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] != prompt


def test_merging_answers_are_split_each_with_its_exact_prompt():
    tokenizer = newline_merging_tokenizer()
    template = ChatTemplate(tokenizer)
    conversation = chat(("user", "q"), ("assistant", "\na"), ("user", "r"), ("assistant", "b"))
    examples = template.encode(conversation)
    assert [trained(tokenizer, example) for example in examples] == [["\na<|im_end|>"], ["b<|im_end|>"]]
    for example, turns in zip(examples, (1, 3), strict=True):
        ((start, end),) = stretches(example)
        assert example.input_ids[:start] == template.prompt_ids(conversation.messages[:turns])
        assert end == len(example.input_ids)


def test_merging_tokenizer_without_merges_keeps_one_example():
    tokenizer = newline_merging_tokenizer()
    (example,) = ChatTemplate(tokenizer).encode(TWO)
    assert trained(tokenizer, example) == ["a1<|im_end|>", "a2<|im_end|>"]


def test_merge_inside_a_turn_is_kept():
    tokenizer = newline_merging_tokenizer()
    (example,) = ChatTemplate(tokenizer).encode(chat(("user", "q\n\n"), ("assistant", "a\n\n"), *ONE.messages))
    assert trained(tokenizer, example) == ["a\n\n<|im_end|>", "a<|im_end|>"]
    assert example.input_ids.count(tokenizer.convert_tokens_to_ids("ĊĊ")) == 2


@pytest.mark.parametrize("prepend", ["always", "first", "never"])
def test_tokenizer_that_puts_a_space_before_texts_puts_none_before_answers(prepend):
    tokenizer = sentencepiece_like_tokenizer(prepend)
    template = ChatTemplate(tokenizer)
    conversation = chat(("user", "q"), ("assistant", "a"))
    (example,) = template.encode(conversation)
    whole = tokenizer(template.render(conversation.messages), add_special_tokens=False)["input_ids"]
    assert whole[: len(template.prompt_ids(conversation.messages[:1]))] == template.prompt_ids(
        conversation.messages[:1]
    )
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
    assert tokens == tokenizer.convert_ids_to_tokens(whole[: whole.index(tokenizer.eos_token_id, -3) + 1])
    assert tokens[-2:] == ["a", "</s>"]


def test_template_without_end_token_is_refused():
    with pytest.raises(DataError) as error:
        ChatTemplate(tiny_tokenizer(NO_END)).encode(ONE)
    assert str(error.value) == (
        "the chat template closes an answer with no end token ('a\\n'), so the model could not learn to stop; "
        "give a data.chat_template that does."
    )


@pytest.mark.parametrize("question", ["q", "q" * 60])
def test_generation_prompt_that_is_no_prefix_is_refused_and_shows_both(question):
    with pytest.raises(DataError) as error:
        ChatTemplate(tiny_tokenizer(OTHER_PROMPT)).encode(chat(("user", question), ("assistant", "a" * 50)))
    text = str(error.value)
    assert text.startswith("the chat template's generation prompt is not how it begins an answer (prompt ends in '")
    assert "<|im_start|>bot\\n', the answered text has '" in text
    assert "<|im_start|>assi'); give a data.chat_template whose add_generation_prompt matches." in text


def test_short_generation_prompt_that_is_no_prefix_shows_the_answered_text():
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
    tokenizer = tiny_tokenizer(template + "{% if add_generation_prompt %}bot:{% endif %}")
    with pytest.raises(DataError, match=r"the answered text has 'user:q<\|im_end\|>assi'"):
        ChatTemplate(tokenizer).encode(chat(("user", "q"), ("assistant", "a" * 60)))


def test_refused_roles_are_named_with_the_reason():
    with pytest.raises(DataError) as error:
        ChatTemplate(tiny_tokenizer(NO_SYSTEM)).encode(TWO)
    assert str(error.value) == "the chat template refuses these turns (system, user): System role not supported"


def test_broken_template_is_a_data_error():
    with pytest.raises(DataError, match=r"^the chat template refuses these turns \(user\): unexpected 'end of"):
        ChatTemplate(tiny_tokenizer("{% for m in")).encode(ONE)


def test_conversation_without_an_answer_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"^a conversation needs at least one assistant turn to train on, got none\.$"):
        ChatTemplate(tokenizer).encode(chat(("user", "q")))


def test_conversation_that_opens_with_an_answer_is_refused_for_that_reason(tokenizer):
    with pytest.raises(DataError) as error:
        ChatTemplate(tokenizer).encode(chat(("assistant", "hello"), ("user", "q"), ("assistant", "a")))
    assert "assistant" in str(error.value)
    assert "these turns ()" not in str(error.value)


def test_template_is_given_as_text_or_file(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(CHAT_TEMPLATE, encoding="utf-8")
    expected = ChatTemplate(tiny_tokenizer()).encode(TWO)
    assert ChatTemplate(tiny_tokenizer(None), CHAT_TEMPLATE).encode(TWO) == expected
    assert ChatTemplate(tiny_tokenizer(NO_END), str(file)).encode(TWO) == expected


@pytest.mark.parametrize("template", ["nowhere.jinja", "", "plain text"])
def test_template_that_is_neither_file_nor_jinja_is_refused(template):
    with pytest.raises(ConfigError) as error:
        ChatTemplate(tiny_tokenizer(), template)
    assert (
        str(error.value)
        == f"data.chat_template {template!r} is neither a file nor a Jinja template, nor the word plain."
    )


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0, 0, 0], "abc"),
        ([0, 1, 0], "a[b]c"),
        ([0, 1, 1], "a[bc]"),
        ([0, 0, 0.5], "ab[c]"),
    ],
)
def test_mark_brackets_the_trained_stretches(tokenizer, weights, expected):
    ids = tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert mark(tokenizer, Example(ids, weights), "[", "]") == expected


# Line breaks, quotes, Jinja and special-token syntax, one to four bytes a character.
PIECES = [*"ab \n\t\"'`{}%<|>é中😀\u2028\\", "\n\n", "<think>", "</think>"]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join).filter(str.strip)
ROUNDS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)
PROPERTY = settings(max_examples=80, deadline=None, derandomize=True)


def conversation_of(system, rounds):
    turns = [] if system is None else [("system", system)]
    for question, answer in rounds:
        turns += [("user", question), ("assistant", answer)]
    return chat(*turns)


TOKENIZERS = {
    "plain": tiny_tokenizer(),
    "reasoning": tiny_tokenizer(REASONING),
    "merging": newline_merging_tokenizer(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@PROPERTY
@given(system=st.none() | TEXT, rounds=ROUNDS)
def test_any_conversation_trains_exactly_its_answers_on_exact_prompts(name, system, rounds):
    tokenizer = TOKENIZERS[name]
    template = ChatTemplate(tokenizer)
    conversation = conversation_of(system, rounds)
    examples = template.encode(conversation)
    answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    assert len(examples) in (1, len(answers))
    found = [(example, *stretch) for example in examples for stretch in stretches(example)]
    assert len(found) == len(answers)
    for (example, start, end), place in zip(found, answers, strict=True):
        prompt, answer = conversation.messages[:place], conversation.messages[place].content
        assert tokenizer.decode(example.input_ids[start:end]) == answer + END
        assert example.input_ids[:start] == template.prompt_ids(prompt)
    for example in examples:
        assert example.weights[0] == 0
        assert len(example.input_ids) == len(example.weights)
        assert example.weights[-1] == 1
    last = examples[-1]
    assert tokenizer.decode(last.input_ids) + "\n" == template.render(conversation.messages)


@PROPERTY
@given(system=st.none() | TEXT, rounds=ROUNDS)
def test_a_template_that_never_rewrites_gives_one_example(system, rounds):
    assert len(ChatTemplate(TOKENIZERS["plain"]).encode(conversation_of(system, rounds))) == 1
