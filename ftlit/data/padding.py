"""The pad token of a sequence classifier, and a chat template that ends where a conversation ends."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING

from ftlit.data.templating import ChatTemplate
from ftlit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPEN = "{% set whole_text %}"


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A pad token that never ends a text.

    transformers reads a decoder's classifier at the last token that is not the pad token. Where a model pads with its
    end token, as many do, that would be the token before the end; so another special token is taken.

    Args:
        tokenizer: The model's tokenizer.

    Returns:
        The tokenizer's own pad token where it is no end token, else the unknown token or another special one; None if
        there is none (transformers then takes one text at a time, and its last token).
    """
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        with contextlib.suppress(DataError, ConfigError):  # a template that closes no answer ends none
            ends.update(ChatTemplate(tokenizer).end_tokens())
    added = tokenizer.added_tokens_decoder
    special = [*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)]
    wanted = [tokenizer.pad_token_id, tokenizer.unk_token_id]
    wanted += [number for number in special if number != tokenizer.bos_token_id]
    return next((n for n in [*wanted, tokenizer.bos_token_id] if n is not None and n not in ends), None)


def closed_template(template: str) -> str:
    """A chat template without the white space that it puts after its last token; prompts stay as they are.

    So `apply_chat_template` of plain transformers gives the tokens that a classifier was trained on.

    Args:
        template: A Jinja chat template.
    """
    if template.startswith(_OPEN):
        return template
    inner = template.removesuffix("\n")  # Jinja itself leaves out the last line break of a template
    return _OPEN + inner + "{% endset %}{{ whole_text if add_generation_prompt else whole_text.rstrip() }}"


def classifier_tokenizer(tokenizer: PreTrainedTokenizerBase, pad: int | None) -> PreTrainedTokenizerBase:
    """The tokenizer that goes with a trained classifier: its pad token, padding on the right, closed templates.

    Args:
        tokenizer: The tokenizer of the training; a changed copy is returned.
        pad: The pad token of the classifier.
    """
    own = copy.deepcopy(tokenizer)
    if pad is not None:
        own.pad_token = own.convert_ids_to_tokens(pad)
    own.padding_side = "right"
    template = own.chat_template
    if isinstance(template, str):
        own.chat_template = closed_template(template)
    elif template:
        own.chat_template = {name: closed_template(one) for name, one in template.items()}
    return own


__all__ = ["classifier_tokenizer", "closed_template", "pad_token"]
