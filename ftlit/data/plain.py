"""The chat template for models that come without one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftlit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Assistant:\n' + message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] + '\n\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
"""`### User:`, a line break, the text, an empty line; `### Assistant:`, a line break, the answer, the end token."""


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The plain template for a tokenizer, with the begin token in front where the tokenizer itself puts one.

    Raises:
        ConfigError: If the tokenizer has no end token to close an answer with.
    """
    if tokenizer.eos_token is None:
        raise ConfigError(
            "this model's tokenizer has neither a chat template nor an end token; give a data.chat_template whose "
            "answers end in a special token."
        )
    begins = opening_tokens(tokenizer)
    if begins and tokenizer.bos_token_id is not None and begins[0] == tokenizer.bos_token_id:
        return "{{ bos_token }}" + PLAIN
    return PLAIN


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer itself puts before every text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []
