"""TRL's training templates: which rows they take, and that what is trained is what TRL's own mask says."""

import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ftlit.data.formats import Conversation, Message
from ftlit.data.templating import ChatTemplate
from ftlit.errors import DataError

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*_training.jinja"))
SPECIAL = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|\[gMASK\]|<sop>|<end_of_utterance>"
    r"|<(?:turn|channel|tool_call|tool_response|tool)\|>|<\|(?:turn|channel|tool_call|tool_response|tool)>"
)


def tokenizer_of(name):
    """Bytes, and the special tokens that a template writes."""
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    specials = sorted({*SPECIAL.findall(template), "<|endoftext|>", "<s>", "</s>"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate([*specials, *letters])}
    inner = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def turn(role, content, **more):
    return Message(role, content, 1.0, more or None)


CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Öl"}}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "City"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": PARAMETERS}}
ROWS = {
    "plain": Conversation((turn("user", "Hello"), turn("assistant", "Hi there"))),
    "turns": Conversation(
        (turn("user", "Hello"), turn("assistant", "Hi"), turn("user", "And you"), turn("assistant", "Fine"))
    ),
    "call": Conversation(
        (
            turn("user", "Weather?"),
            turn("assistant", "", tool_calls=[CALL]),
            turn("tool", "sunny", name="weather", tool_call_id="call00001"),
            turn("assistant", "Sun"),
        ),
        (TOOL,),
    ),
    "thought": Conversation((turn("user", "2+2?"), turn("assistant", "Four", reasoning_content="two twice"))),
}
# What a template cannot show is refused: it reads neither tools nor calls, or no reasoning.
LOST = "does not show|refuses these turns|has a thought, but the chat template's generation prompt ends in an empty one"
# These open a thought for generation that they do not show in answers.
OPENS = ("deepseek_r1_distill_training", "deepseekv3_training")
# These open it with a line break that they do not show where nothing was thought: prompts differ from turns.
BREAKS = tuple(name for name in NAMES if name.startswith("nemotron"))
TAKES_CALLS = 17
TAKES_THOUGHTS = 14


def encoded(name, row):
    tokenizer = tokenizer_of(name)
    try:
        return tokenizer, ChatTemplate(tokenizer).encode(ROWS[row])
    except DataError as error:
        if row in ("call", "thought") and re.search(LOST, str(error)):
            return tokenizer, None
        raise


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_is_what_its_mask_says(name, row):
    """All of it but what generation is fed, and what follows the end token."""
    tokenizer, examples = encoded(name, row)
    if examples is None or len(examples) > 1 or name in OPENS or (name in BREAKS and row == "plain"):
        return
    (ours,) = examples
    record = ROWS[row]
    theirs = tokenizer.apply_chat_template(
        ChatTemplate(tokenizer).renderer.turns(record.messages, record.tools),
        list(record.tools) if record.tools else None,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    mask, weights = theirs["assistant_masks"], [int(weight) for weight in ours.weights]
    assert theirs["input_ids"][: len(weights)] == ours.input_ids
    assert tokenizer.decode(theirs["input_ids"][len(weights) :]).strip() == ""
    assert all(marked for marked, trained in zip(mask, weights, strict=False) if trained)
    fed = [
        len(ChatTemplate(tokenizer).prompt_ids(record.messages[:number], record.tools))
        for number, message in enumerate(record.messages)
        if message.role == "assistant"
    ]
    for place, (marked, trained) in enumerate(zip(mask, weights, strict=False)):
        if marked and not trained:
            is_fed = any(place < end and all(mask[place:end]) for end in fed)
            is_after = ours.input_ids[place - 1] in ChatTemplate(tokenizer)._special
            assert is_fed or is_after


@pytest.mark.parametrize("name", OPENS)
def test_thoughts_that_generation_opens_are_gone_on_from(name):
    tokenizer, (example,) = encoded(name, "thought")
    trained = [token for token, weight in zip(example.input_ids, example.weights, strict=True) if weight]
    assert tokenizer.decode(trained) == "two twice\n</think>\n\nFour<｜end▁of▁sentence｜>"


def test_most_of_them_take_calls_and_thoughts():
    assert sum(encoded(name, "call")[1] is not None for name in NAMES) >= TAKES_CALLS
    assert sum(encoded(name, "thought")[1] is not None for name in NAMES) >= TAKES_THOUGHTS
