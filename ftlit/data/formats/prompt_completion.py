"""Rows with a prompt and a completion: plain texts, or lists of messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from ftlit.data.formats.base import Completion, Conversation, Message, Record, RowError, RowFormat, text_of, weight_of
from ftlit.data.formats.turns import (
    as_turns,
    refuse_media,
    tools_of,
    turns_of,
    with_system_column,
    with_tools,
)


class PromptCompletion(RowFormat):
    """`{"prompt": ..., "completion": ...}`, both texts or both lists of messages, as TRL reads them.

    Texts are joined as they are, without a chat template, and the end token follows; for a chat of two turns use
    `Alpaca` with `data.columns: {instruction: prompt, output: completion}`. Lists of messages go through the chat
    template; only the assistant turns of the completion are trained. So do texts in rows with a `system` column:
    they are a user's turn and its answer.
    """

    columns: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    optional: ClassVar[tuple[str, ...]] = ("system", "tools", "weight")

    @override
    def __call__(self, row: Mapping[str, Any]) -> Record:
        refuse_media(row)
        prompt, completion = as_turns(row.get("prompt")), row.get("completion")
        if isinstance(prompt, list | tuple):
            if not isinstance(as_turns(completion), list | tuple):
                raise RowError("completion", "a list of messages, as the prompt does", completion)
            return self._conversation(row, turns_of(row, "prompt"), turns_of(row, "completion"))
        if isinstance(prompt, str) and isinstance(completion, list | tuple):
            raise RowError("completion", "text, as the prompt does", completion)
        if self._needs_template(row):
            answer = Message("assistant", text_of(row, "completion"))
            return self._conversation(row, (Message("user", text_of(row, "prompt")),), (answer,))
        return Completion(text_of(row, "prompt"), text_of(row, "completion"), weight_of(row))

    @override
    def prompt(self, row: Mapping[str, Any]) -> Conversation | Completion:
        refuse_media(row)
        if isinstance(as_turns(row.get("prompt")), list | tuple):
            return self._conversation(row, turns_of(row, "prompt"), ())._replace(weight=1.0, given=0)
        if self._needs_template(row):
            question = Message("user", text_of(row, "prompt"))
            return self._conversation(row, (question,), ())._replace(weight=1.0, given=0)
        return Completion(text_of(row, "prompt"), "")

    @staticmethod
    def _needs_template(row: Mapping[str, Any]) -> bool:
        """Whether a row of texts has a column that only a template can show, filled or not, so that rows are alike.

        Raises:
            RowError: If it has tools.
        """
        if tools_of(row):
            raise RowError(
                "tools",
                "nothing where prompt and completion are texts (give lists of messages, or leave the column out with "
                "data.columns={tools: null})",
                row["tools"],
            )
        return "system" in row

    @staticmethod
    def _conversation(
        row: Mapping[str, Any], prompt: tuple[Message, ...], completion: tuple[Message, ...]
    ) -> Conversation:
        given = with_system_column(prompt, row)
        messages, tools = with_tools((*given, *completion), tools_of(row))
        return Conversation(messages, tools, weight_of(row), len(given))
