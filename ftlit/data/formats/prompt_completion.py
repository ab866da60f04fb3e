"""Rows with a prompt and a completion: plain texts, or lists of messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from ftlit.data.formats.base import Completion, Conversation, Record, RowError, RowFormat, text_of, weight_of
from ftlit.data.formats.turns import tools_of, turns_of


class PromptCompletion(RowFormat):
    """`{"prompt": ..., "completion": ...}`, both texts or both lists of messages, as TRL reads them.

    Texts are joined as they are, without a chat template, and the end token follows; for a chat of two turns use
    `Alpaca` with `data.columns: {instruction: prompt, output: completion}`. Lists of messages go through the chat
    template; only the assistant turns of the completion are trained.
    """

    columns: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    optional: ClassVar[tuple[str, ...]] = ("tools", "weight")

    @override
    def __call__(self, row: Mapping[str, Any]) -> Record:
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, list | tuple):
            if not isinstance(completion, list | tuple):
                raise RowError("completion", "a list of messages, as the prompt does", completion)
            given = turns_of(row, "prompt")
            return Conversation((*given, *turns_of(row, "completion")), tools_of(row), weight_of(row), len(given))
        if isinstance(prompt, str) and isinstance(completion, list | tuple):
            raise RowError("completion", "text, as the prompt does", completion)
        return Completion(text_of(row, "prompt"), text_of(row, "completion"), weight_of(row))

    @override
    def prompt(self, row: Mapping[str, Any]) -> Conversation | Completion:
        if isinstance(row.get("prompt"), list | tuple):
            return Conversation(turns_of(row, "prompt"), tools_of(row))
        return Completion(text_of(row, "prompt"), "")
