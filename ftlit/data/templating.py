"""The only place where it is decided which tokens are trained: every assistant turn with its end token, nothing else.

A row is rendered by the model's own chat template, cut where generation would start each answer, and tokenized piece by
piece: so the prompt of every trained answer is, token for token, what `generate` will be fed. Where a template shows
earlier turns differently once later ones follow (it drops old reasoning, say), or where an answer's first characters
would merge with the prompt, no single row can hold all answers exactly; the conversation is then split into one
example an answer, each with its own exact prompt. Nothing is found by searching for tokens, so it does not matter that
a model pads with its end token.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from ftlit.batch import Example
from ftlit.data.formats.base import Conversation, Message
from ftlit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatTemplate:
    """Turns conversations into tokens and weights.

    Args:
        tokenizer: The model's tokenizer.
        template: A Jinja chat template, or the path of one, to use instead of the tokenizer's.

    Raises:
        ConfigError: If there is no template at all, or no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        if template is not None:
            tokenizer.chat_template = (
                Path(template).read_text(encoding="utf-8")
                if "{" not in template and Path(template).is_file()
                else template
            )
            if "{" not in tokenizer.chat_template:
                raise ConfigError(f"data.chat_template {template!r} is neither a file nor a Jinja template.")
        if not tokenizer.chat_template:
            raise ConfigError(
                "this model's tokenizer has no chat template; give one as data.chat_template (a Jinja file or text)."
            )
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = set(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The text of some messages; with `prompt`, up to where the next answer starts.

        Raises:
            DataError: If the template refuses the messages.
        """
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(role for role, _ in messages)
            raise DataError(f"the chat template refuses these turns ({roles}): {error}") from None

    def end_tokens(self) -> list[int]:
        """The tokens that the template closes an answer with, which is what training teaches the model to end with."""
        closed = self.encode(Conversation((Message("user", "Hello"), Message("assistant", "Hello"))))
        return [int(closed[-1].input_ids[-1])]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that generation is fed to answer some messages."""
        return self._tokenize([self.render(messages, prompt=True)])[0]

    def encode(self, conversation: Conversation) -> list[Example]:
        """The examples of a conversation: one as a rule, one an answer where one could not be exact.

        Raises:
            DataError: If a conversation has no assistant turn, or the template cannot be followed.
        """
        answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        if not answers:
            raise DataError("a conversation needs at least one assistant turn to train on, got none.")
        if all(message.role == "system" for message in conversation.messages[: answers[0]]):
            raise DataError("a conversation must open with a user turn, got an assistant turn.")
        whole = self._together(conversation, answers)
        return [whole] if whole is not None else [self._one(conversation, answer) for answer in answers]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        try:
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        except (TypeError, UnicodeError) as error:
            raise DataError(f"the text cannot be tokenized; is it valid Unicode? ({error})") from None

    def _cut(self, conversation: Conversation, answer: int) -> tuple[str, str]:
        """The prompt before one answer, and the answer as the template closes it."""
        prompt = self.render(conversation.messages[:answer], prompt=True)
        closed = self.render(conversation.messages[: answer + 1])
        if not closed.startswith(prompt):
            begins = closed[max(0, len(prompt) - 40) : len(prompt)]
            raise DataError(
                "the chat template's generation prompt is not how it begins an answer "
                f"(prompt ends in {prompt[-40:]!r}, the answered text has {begins!r}); "
                "give a data.chat_template whose add_generation_prompt matches."
            )
        return prompt, closed[len(prompt) :]

    def _trained(self, ids: list[int], text: str) -> int:
        """How many tokens of a closed answer are trained: up to and with its last special token."""
        trained = max((place + 1 for place, token in enumerate(ids) if token in self._special), default=0)
        end = self.tokenizer.convert_ids_to_tokens(ids[trained - 1]) if trained else ""
        if not end or text[text.rfind(end) + len(end) :].strip():
            raise DataError(
                f"the chat template closes an answer with no end token ({text[-30:]!r}), so the model could not learn "
                "to stop; give a data.chat_template that does."
            )
        return trained

    def _together(self, conversation: Conversation, answers: list[int]) -> Example | None:
        """All answers in one example, or None where that would not be exact for each."""
        ids: list[int] = []
        weights: list[float] = []
        for answer in answers:
            before, trained = self._pair(conversation, answer)
            if before[: len(ids)] != ids:
                return None
            weights += [0.0] * (len(before) - len(ids)) + [1.0] * len(trained)
            ids = before + trained
        return Example(ids, weights)

    def _one(self, conversation: Conversation, answer: int) -> Example:
        """One answer with its exact prompt."""
        before, trained = self._pair(conversation, answer)
        return Example(before + trained, [0.0] * len(before) + [1.0] * len(trained))

    def _pair(self, conversation: Conversation, answer: int) -> tuple[list[int], list[int]]:
        """The tokens that generation is fed before an answer, and the trained tokens of the answer."""
        prompt, text = self._cut(conversation, answer)
        before, whole = self._tokenize([prompt, prompt + text])
        if whole[: len(before)] == before:
            own = whole[len(before) :]
        else:  # its first characters would merge with the prompt's last: generation cannot undo its prompt
            (own,) = self._tokenize([text])
        return before, own[: self._trained(own, text)]


def terminal_marks() -> tuple[str, str, str]:
    """Opening mark, closing mark, and what to say of them: colour on a terminal, brackets in a file."""
    if sys.stdout.isatty():
        return "\x1b[1;32m", "\x1b[0m", "in green"
    return "⟦", "⟧", "between ⟦ ⟧"


def mark(tokenizer: PreTrainedTokenizerBase, example: Example, opening: str = "⟦", closing: str = "⟧") -> str:
    """An example as text with its trained stretches between marks."""
    parts: list[str] = []
    stretch: list[int] = []
    for place, token in enumerate(example.input_ids):
        if place and bool(example.weights[place]) != bool(example.weights[place - 1]):
            parts.append(tokenizer.decode(stretch))
            parts.append(opening if example.weights[place] else closing)
            stretch = []
        stretch.append(token)
    parts.append(tokenizer.decode(stretch))
    if example.weights and example.weights[-1]:
        parts.append(closing)
    return "".join(parts)
