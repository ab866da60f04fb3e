"""Rows of the Alpaca kind: an instruction, perhaps an input, and an output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from ftlit.data.formats.base import Conversation, Message, RowError, RowFormat, note, text_of, weight_of
from ftlit.data.formats.turns import refuse_media, tools_of
from ftlit.data.formats.written import parsed


class Alpaca(RowFormat):
    """`{"instruction": "...", "input": "...", "output": "..."}`; `system` and `history` (pairs of texts) are optional.

    The input follows the instruction after a line break. The answer is `output`, of several reference answers
    (a list, or SQuAD's object with a list `text`) the first. A `tools` column for the chat template
    and a `weight` column are optional too.
    """

    columns: ClassVar[tuple[str, ...]] = ("instruction", "output")
    optional: ClassVar[tuple[str, ...]] = ("input", "system", "history", "tools", "weight")
    answer: ClassVar[str | None] = "output"

    @override
    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        refuse_media(row)
        turns = []
        if system := text_of(row, "system", required=False):
            turns.append(Message("system", system))
        turns += self._history(row)
        question = text_of(row, "instruction")
        if extra := text_of(row, "input", required=False):
            question = f"{question}\n{extra}"
        turns += [Message("user", question), Message("assistant", self._answer(row))]
        return Conversation(tuple(turns), tools_of(row), weight_of(row))

    @override
    def prompt(self, row: Mapping[str, Any]) -> Any:
        return super().prompt({**row, "output": None} if is_references(row.get("output")) else row)

    @staticmethod
    def _answer(row: Mapping[str, Any]) -> str:
        """The answer of a row, the first of several."""
        given = row.get("output")
        if not is_references(given):
            return text_of(row, "output")
        texts = given["text"] if isinstance(given, Mapping) else given
        if not texts or not texts[0].strip():
            wanted = "an answer (the question has none: leave the row out, or write the text that is to be said)"
            raise RowError("output", wanted, given)
        if len(set(texts)) > 1:
            note("of several reference answers the first is read")
        return str(texts[0])

    @staticmethod
    def _history(row: Mapping[str, Any]) -> list[Message]:
        """The turns before the instruction."""
        turns: list[Message] = []
        history = parsed(row.get("history")) or []
        if not isinstance(history, list | tuple):
            raise RowError("history", "a list of pairs of texts", history)
        for number, pair in enumerate(history):
            if (
                not isinstance(pair, list | tuple)
                or len(pair) != 2
                or not all(isinstance(t, str) and t.strip() for t in pair)
            ):
                raise RowError(f"history[{number}]", "a pair of texts", pair)
            turns += [Message("user", pair[0]), Message("assistant", pair[1])]
        return turns


def is_references(value: Any) -> bool:
    """Whether something is a list of texts, or SQuAD's object with such a list, empty or not."""
    texts = value.get("text") if isinstance(value, Mapping) else value
    return isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
