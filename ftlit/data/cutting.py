"""Where an answer lies in a rendered conversation: what generation is fed, and what the model is to write then.

As a rule the text of the turns up to and with an answer begins with what generation is fed, and the rest is the
answer. Two kinds of templates need more. Where the generation prompt opens a thought (`<think>` and a line break) that
the template does not show in answers, the answer goes on from the open thought: with what the row thinks, or else by
closing it. Where a template closes no answer, because the token that opens the next turn does, that token is the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ftlit.data.formats.base import Conversation, Message
from ftlit.data.prefixes import Prefixes
from ftlit.data.rendering import REASONING, Rendered, Renderer, calls_of, reasoning_of
from ftlit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A generation prompt that ends in an open thought, or in an empty one.
_OPEN = re.compile(r"(?:<(think|thinking|thought|reasoning)>|\[(THINK)\])\s*(</\1>|\[/\2\])?\s*$")
_MARK = "zqmark"


def prefilled(prompt: str) -> str:
    r"""The thought that a generation prompt opens, such as `<think>\n`: the answer begins with it, and goes on from it.

    An empty thought belongs to the prompt.
    """
    opened = _OPEN.search(prompt)
    return "" if opened is None or opened[3] else opened[0].lstrip()


class Cut(NamedTuple):
    """An answer.

    Attributes:
        prompt: What generation is fed.
        text: The answer, up to where the template ends it.
        marks: The stretches of `text` that the template marks as trained; None where it has no marks.
        thought: Whether what the row thinks was put into the prompt's open thought here, not by the template.
    """

    prompt: str
    text: str
    marks: list[tuple[int, int]] | None
    thought: bool = False


class Cutter:
    """Cuts conversations into prompts and answers.

    Args:
        render: The renderer.
        tokenizer: The tokenizer.
        special: Its special tokens.
    """

    def __init__(self, render: Renderer, tokenizer: PreTrainedTokenizerBase, special: set[int]) -> None:
        self.render, self.tokenizer = render, tokenizer
        self._special = [token for token in map(str, tokenizer.convert_ids_to_tokens(sorted(special))) if token]

    def __call__(self, conversation: Conversation, answers: Sequence[int]) -> Iterator[Cut]:
        """The answers of a conversation.

        Args:
            conversation: The conversation.
            answers: The numbers of its answers, ascending.

        Raises:
            DataError: If the generation prompt is not how the template begins an answer, or it ends none.
        """
        messages = conversation.messages[: answers[-1] + 1]
        prefixes = Prefixes(
            self.render, messages, conversation.tools, conversation.template_kwargs, watch=len(answers) > 2
        )
        for number in answers:
            yield self._cut(conversation, number, prefixes.prompt(number), prefixes.closed(number + 1))

    def _cut(self, conversation: Conversation, number: int, prompt: str, closed: Rendered) -> Cut:
        ending = self._ending(conversation, number, prompt, closed.text)
        text = closed.text + ending
        marks = closed.marks
        if marks is not None and ending and marks and marks[-1][1] == len(closed.text):
            marks = [*marks[:-1], (marks[-1][0], len(text))]
        if text.startswith(prompt):
            return Cut(prompt, text[len(prompt) :], _clipped(marks, len(prompt)))
        thinks = _OPEN.search(prompt)
        if thinks is not None and text.startswith(prompt[: thinks.start()]):
            return _into_thought(conversation.messages[number], prompt, thinks, text, marks)
        start = self._start(conversation, number, prompt, text)
        return Cut(prompt, text[start:], _clipped(marks, start))

    def _start(self, conversation: Conversation, number: int, prompt: str, text: str) -> int:
        """Where an answer starts whose earlier turns look otherwise now that it is there.

        It starts behind what the generation prompt adds to the turns, the last time that stands before its first word.
        """
        messages, tools, options = conversation.messages, conversation.tools, conversation.template_kwargs
        before = self.render(messages[:number], tools, options=options)
        header = prompt[len(before) :] if prompt.startswith(before) else ""
        marked = self.render((*messages[:number], _marked(messages[number])), tools, options=options)
        start = marked.rfind(header, 0, max(marked.find(_MARK), 0)) + len(header)
        if header and start >= len(header) and text.startswith(marked[:start]):
            return start
        begins = text[max(0, len(prompt) - 40) : len(prompt)]
        raise DataError(
            "the chat template's generation prompt is not how it begins an answer "
            f"(prompt ends in {prompt[-40:]!r}, the answered text has {begins!r}); "
            "give a data.chat_template whose add_generation_prompt matches."
        )

    def _ending(self, conversation: Conversation, number: int, prompt: str, closed: str) -> str:
        """The token that opens the next turn, where the template ends an answer with none of its own."""
        if self._ends(closed) or not any(token in closed for token in self._special):
            return ""
        messages, tools, options = conversation.messages, conversation.tools, conversation.template_kwargs
        # Without thoughts, which may go once a turn follows.
        bare = [_marked(m, thinks=False) if m.role == "assistant" else m for m in messages[: number + 1]]
        follows = Message("tool" if calls_of(bare[-1]) else "user", _MARK)
        try:
            short = self.render(bare, tools, options=options)
            longer = self.render((*bare, follows), tools, options=options)
        except DataError:
            return ""
        after = longer[len(short) :].split(_MARK)[0]
        opener = next((token for token in self._special if after.strip().startswith(token)), "")
        places = {prompt.rfind(token): token for token in self._special}
        if not longer.startswith(short) or not opener or places[max(places)] == opener:
            return ""  # a token that opens every turn also opens answers: it ends none
        return after[: after.find(opener) + len(opener)]

    def _ends(self, closed: str) -> bool:
        bare = closed.rstrip()
        return any(bare.endswith(token) for token in self._special)


def _marked(message: Message, thinks: bool = True) -> Message:
    """An answer with marks for what it says and thinks."""
    more = {
        name: _MARK if name in REASONING else value
        for name, value in (message.more or {}).items()
        if thinks or name not in REASONING
    }
    return message._replace(content=_MARK if message.content.strip() else message.content, more=more or None)


def _clipped(marks: Sequence[tuple[int, int]] | None, start: int) -> list[tuple[int, int]] | None:
    """Marks behind a place, counted from there: what generation is fed is never trained."""
    if marks is None:
        return None
    return [(max(first, start) - start, last - start) for first, last in marks if last > start]


def _into_thought(
    message: Message, prompt: str, opened: re.Match[str], text: str, marks: Sequence[tuple[int, int]] | None
) -> Cut:
    """An answer that goes on from the thought with which the generation prompt ends.

    Args:
        message: The answer.
        prompt: What generation is fed.
        opened: The thought at its end.
        text: The turns up to and with the answer, as the template shows them.
        marks: The template's marks in `text`.
    """
    tag = opened[0].split(">")[0].split("]")[0]
    tag += ">" if tag[0] == "<" else "]"
    close = tag[0] + "/" + tag[1:]
    shown = text[opened.start() :]
    if marks is not None and not any(
        first <= opened.start() + 1 and last >= len(text.rstrip()) for first, last in marks
    ):
        raise DataError(
            "the chat template's {% generation %} marks leave out a part of an answer whose thought the generation "
            "prompt opens; mark the whole answer."
        )
    trained = None if marks is None else [(0, len(shown) + len(message.content) + len(reasoning_of(message)) + 64)]
    content, thought = message.content, reasoning_of(message).strip()
    if close in content:
        inner, _, rest = content.rpartition(close)
        thought = thought or inner.strip().removeprefix(tag).strip()
        content = rest
    if opened[3]:  # the prompt thinks nothing
        if thought:
            raise DataError(
                "the answer has a thought, but the chat template's generation prompt ends in an empty one "
                f"({opened[0]!r}); set enable_thinking to true in chat_template_kwargs, or take the thought out."
            )
        return Cut(prompt, shown.lstrip().removeprefix(opened[0].strip()).lstrip("\n"), trained)
    if shown.lstrip().startswith(tag):  # only white space differs
        return Cut(prompt, shown.lstrip().removeprefix(tag).lstrip(), trained)
    after = shown.lstrip("\n")
    between = close + "\n\n"
    if close in message.content and not reasoning_of(message):
        between = close + content[: len(content) - len(content.lstrip())]
    return Cut(prompt, f"{thought}\n{between}{after}", trained, thought=bool(thought))


__all__ = ["Cut", "Cutter", "prefilled"]
