"""Text without a chat template: where it begins, where it ends, and where a prompt and what goes on from it meet."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ftlit.data.formats import Completion, Conversation, Message, Text
from ftlit.data.templating import ChatTemplate, mark
from ftlit.testing import tiny_tokenizer

CORPUS = [
    "The cat sat on the mat.",
    "It was sad, so sat there.",
    "def add(a, b):\n    return a + b\n",
    "Q: 1 + 12 = 13",
] * 9
STRIPS = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def legacy():
    """As Llama 2 and Phi 3 have it: a space before each stretch between special tokens."""
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return None, prepend, STRIPS


def metaspace(scheme, split=False):
    """As newer files of Llama 2 and Mistral have it."""

    def parts():
        space = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=split)
        plain = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        return space, None, plain if scheme == "never" else STRIPS

    return parts


def own_decoder():
    return pre_tokenizers.Metaspace("▁"), None, decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁")])


def byte_level():
    return pre_tokenizers.ByteLevel(add_prefix_space=False), None, decoders.ByteLevel()


KINDS = {
    "legacy": legacy,
    "always": metaspace("always"),
    "always, split": metaspace("always", True),
    "first": metaspace("first"),
    "never": metaspace("never"),
    "decoder of its own": own_decoder,
    "bytes": byte_level,
}


@pytest.fixture(scope="module")
def made():
    known = {}

    def make(kind, begins=True):
        if (kind, begins) not in known:
            pre, normalizer, decoder = KINDS[kind]()
            tokenizer = Tokenizer(
                models.BPE(byte_fallback=kind != "bytes", unk_token=None if kind == "bytes" else "<unk>")
            )
            if pre is not None:
                tokenizer.pre_tokenizer = pre
            if normalizer is not None:
                tokenizer.normalizer = normalizer
            tokenizer.decoder = decoder
            bytes_ = [] if kind == "bytes" else [f"<0x{number:02X}>" for number in range(256)]
            alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
            trainer = trainers.BpeTrainer(
                vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_], initial_alphabet=alphabet,
                show_progress=False,
            )  # fmt: skip
            tokenizer.train_from_iterator(CORPUS, trainer)
            state = json.loads(tokenizer.to_str())  # bytes are tokens of the model, and not special
            state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
            tokenizer = Tokenizer.from_str(json.dumps(state))
            if begins:
                tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
            known[kind, begins] = PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
            )
        return known[kind, begins]

    return make


def trained(tokenizer, record):
    (example,) = ChatTemplate(tokenizer).encode(record)
    return mark(tokenizer, example)


# ---- where a prompt and its completion meet -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [CORPUS[0], CORPUS[2], "Q: 1 + 12 = 13 ", "Ein Käse, 二加二 = 四"])
def test_the_tokens_read_as_prompt_and_completion(made, kind, text):
    tokenizer = made(kind)
    template = ChatTemplate(tokenizer)
    merged = 0
    for place in range(1, len(text)):
        prompt, completion = text[:place], text[place:]
        if not prompt.strip() or not completion.strip():
            continue
        (example,) = template.encode(Completion(prompt, completion))
        ids = list(example.input_ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, place
        before = template.prompt_of(Completion(prompt, ""))
        assert ids[: len(before)] == before
        assert ids[0] == 1
        assert ids.count(1) == 1
        whole = tokenizer(text)["input_ids"]
        merged += whole[: len(before)] != before
    assert merged  # else nothing was shown


def test_answers_of_a_template_without_a_border_read_as_they_are(made):
    """A template whose generation prompt ends in a space, which the answer's first word would swallow."""
    tokenizer = made("always")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + ' ' }}{% else %}{{ 'A: ' }}"
        "{% generation %}{{ m.content + '</s>' }}{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    conversation = Conversation((Message("user", "cat"), Message("assistant", "sat on")))
    assert trained(tokenizer, conversation) == "Q: cat A: ⟦sat on</s>⟧"
    tokenizer.chat_template = None


# ---- where it begins ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["legacy", "first", "bytes"])
@pytest.mark.parametrize("begins", [True, False])
def test_one_begin_token(made, kind, begins):
    tokenizer = made(kind, begins)
    for text in ("The cat sat.", "<s>The cat sat.", "<s> [INST] cat [/INST] sat </s>"):
        want = int(begins or text.startswith("<s>"))
        (document,) = ChatTemplate(tokenizer).encode(Text(text))
        assert list(document.input_ids).count(1) == want
        (completion,) = ChatTemplate(tokenizer).encode(Completion(text, " sat"))
        assert list(completion.input_ids).count(1) == want
        prompt = ChatTemplate(tokenizer).prompt_of(Text(text))
        assert prompt.count(1) == want
        assert list(completion.input_ids[: len(prompt)]) == prompt


def test_an_opening_of_two_tokens_comes_once():
    tokenizer = tiny_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> <|im_start|> $A", special_tokens=[("<|endoftext|>", 0), ("<|im_start|>", 1)]
    )
    for text in ("a b", "<|endoftext|><|im_start|>a b"):
        (example,) = ChatTemplate(tokenizer).encode(Text(text))
        assert tokenizer.decode(example.input_ids) == "<|endoftext|><|im_start|>a b<|im_end|>"


# ---- where it ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["legacy", "first", "bytes"])
@pytest.mark.parametrize("end", ["", "</s>", "</s>\n", "</s> ", "</s>\n\n", "</s></s>"])
def test_one_end_token(made, kind, end):
    tokenizer = made(kind)
    for record in (Text(f"The cat sat{end}"), Completion("The cat", f" sat{end}")):
        (example,) = ChatTemplate(tokenizer).encode(record)
        assert list(example.input_ids).count(2) == max(1, end.count("</s>"))
        assert example.input_ids[-1] == 2
        assert example.weights[-1] == 1


@pytest.mark.parametrize("kind", ["legacy", "bytes"])
def test_an_end_token_in_the_middle_is_not_the_end(made, kind):
    (example,) = ChatTemplate(made(kind)).encode(Text("cat</s>\nsat\n"))
    assert list(example.input_ids).count(2) == 2
    assert made(kind).decode(example.input_ids, skip_special_tokens=True).split() == ["cat", "sat"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("borders", [(3, 9, 14), (1, 2, 3), (5, 6, 20)])
def test_stretches_read_as_they_are_written_and_only_the_marked_ones_are_trained(made, kind, borders):
    """The first and the third of four are trained, and so is the last, with the end token."""
    tokenizer, text = made(kind), CORPUS[0]
    one, two, three = borders
    record = Completion(text[two:three], text[three:], 1.0, ((text[:one], True), (text[one:two], False)))
    (example,) = ChatTemplate(tokenizer).encode(record)
    ids, weights = list(example.input_ids), list(example.weights)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (ids[0], weights[0], ids[-1], weights[-1]) == (1, 0.0, 2, 1.0)
    assert ids.count(1) == ids.count(2) == 1
    seen, last = "", ""
    for number in range(1, len(ids)):  # every token lies in one stretch, and is trained as that is
        now = tokenizer.decode(ids[: number + 1], skip_special_tokens=True)
        begins, seen = len(seen), now if "\ufffd" not in now else seen
        if len(seen) > begins:
            assert bool(weights[number]) == (begins < one or begins >= three), (number, last)
        last = now
